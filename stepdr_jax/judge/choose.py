"""Makes the judge that a config asks for."""

import os
from collections.abc import Iterable

from stepdr_jax.agent.policy import EndpointPolicy
from stepdr_jax.errors import UserError
from stepdr_jax.judge.judges import Judge, ProgrammaticJudge
from stepdr_jax.judge.model_judge import ModelJudge
from stepdr_jax.runtime.layout import RunLayout

# Settings that do not change verdicts
TRANSPORT_SETTINGS = ("url", "api_key_env", "concurrency", "timeout", "keep_replies")


def judge_settings(config) -> dict[str, object]:
    """The settings that decide verdicts, as dotted names and values."""
    return {f"judge.{name}": value for name, value in config.judge.items() if name not in TRANSPORT_SETTINGS}


def make_judge(config, names: Iterable[str]) -> Judge:
    """Returns the judge of `config.judge`; `names`: see `ProgrammaticJudge`. Raises UserError without an endpoint."""
    section = config.judge
    rules = dict(mapping=section.mapping, max_missing=section.max_missing)
    if section.kind == "programmatic":
        return ProgrammaticJudge(names, **rules)
    if not (section.url and section.model):
        raise UserError(
            "judge.kind=endpoint needs --config.judge.url=http://host:port/v1 and --config.judge.model=NAME"
        )
    policy = EndpointPolicy(
        section.url,
        section.model,
        os.environ.get(section.api_key_env, ""),
        temperature=0.0,
        timeout=section.timeout,
        concurrency=section.concurrency,
    )
    return ModelJudge(
        policy,
        names=names,
        checks=section.checks,
        per_request=section.per_request,
        attempts=section.attempts,
        max_tokens=section.max_tokens,
        replies=RunLayout.from_config(config).judge_replies if section.keep_replies else None,
        **rules,
    )
