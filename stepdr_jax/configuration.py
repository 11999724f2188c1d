"""What makes a config valid beyond the types of its fields: the shape it shares with the miniature, and its numbers.

Checked once, before a stage does any work, so that a mistake costs a second and not a night. Mixture names and paths are
checked by the rooms that use them.
"""

import datetime
import difflib
import numbers
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from stepdr_jax.errors import UserError

STAGES = ("midtrain1", "midtrain2", "sft")
FREE = ("mixture", "kind_weights", "sources", "evaluation_sets")  # sections whose keys are data, not fields
MAY_BE_NEGATIVE = ("seed", "data_seed")
MAY_BE_ZERO = frozenset(
    "temperature kl_coefficient entropy_coefficient weight_decay z_loss warmup_steps critic_warmup_iterations noise_share "
    "chinese_share heldout_share final_learning_rate decay_share price_per_million_tokens max_reflections "
    "heldout_tasks document_copies trajectory_copies warmup_data_steps norm_factor loss_rise max_rollbacks heldout_rows "
    "heldout_every every_tokens process keep_every factor page_size num_pages prefill_calls host_gb tis_cap max_missing "
    "staleness dual_clip max_kl min_entropy max_repetition".split()
)
SHARES = frozenset(
    "heldout_share chinese_share noise_share decay_share gamma gae_lambda max_masked_share beta2 max_missing max_repetition".split()
)
SCHEDULES = ("wsd", "cosine", "constant")  # training.optimizer
REMAT = ("none", "layer", "attention", "offload")  # models.qwen2.REMAT
CHOICES = {
    "first_stage": STAGES,
    "data.on_bad_row": ("stop", "skip"),
    "data.on_damage": ("stop", "skip"),
    "data.exact_duplicates": ("off", "count", "drop"),
    "data.near_duplicates": ("off", "count", "drop"),
    "data.contaminated": ("count", "drop"),
    "agent.prompt": ("compact", "full"),
    "ppo.loss_aggregation": ("token_mean", "seq_mean", "seq_sum"),
    "ppo.guard.action": ("stop", "skip"),  # rl.guards
    "ppo.staleness": (0, 1),
    "ppo.truncated_reward": ("worst", "zero"),
    "parallel.context_strategy": ("auto", "ring", "all_gather", "ulysses"),
    "parallel.attention": ("auto", "reference", "prefix", "blockwise", "splash", "cudnn"),
    "parallel.remat": REMAT,
    "ppo.remat": REMAT,
    "sampler.engine": ("jax", "vllm", "sglang"),
    "sampler.weights_dtype": ("float32", "bfloat16"),
    "sampler.attention": ("auto", "reference", "ragged"),
    "placement.sampler": ("colocated", "disaggregated"),
    "placement.offload": ("none", "idle"),
    "judge.kind": ("programmatic", "endpoint"),
    "judge.mapping": ("strict", "ternary"),
    "model.dtype": ("float32", "bfloat16"),
    "model.param_dtype": ("float32", "bfloat16"),
}


def fields(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted name, value) of every leaf."""
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from fields(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def unknown_field(config: ConfigDict, name: str) -> str | None:
    """Returns a sentence when `name` (dotted) is no field of `config`, naming what is close; None when it is one."""
    section, walked = config, []
    for part in name.split("."):
        if not isinstance(section, ConfigDict) or part not in section:
            known = sorted(section.keys()) if isinstance(section, ConfigDict) else []
            anywhere = [full for full, _ in fields(config) if full.rsplit(".", 1)[-1] == part]
            close = [".".join([*walked, match]) for match in difflib.get_close_matches(part, known, 3, 0.6)]
            hint = " or ".join((close + anywhere)[:3])
            where = ".".join(walked) or "the config"
            fix = f"did you mean {hint}?" if hint else f"it has {', '.join(known) or 'no fields'}"
            return f"{where} has no field {part!r}; {fix}"
        section = section[part]
        walked.append(part)
    return None


def check_shape(config: ConfigDict, reference: ConfigDict, prefix: str = "") -> None:
    """Raises UserError when `config` lacks a field of `reference` or has one more; free sections are not compared."""
    for key in reference:
        if key not in config:
            raise UserError(f"the config lacks {prefix}{key}; add it as in configs/miniature.py")
    for key, value in config.items():
        if key not in reference:
            close = difflib.get_close_matches(key, list(reference), 1)
            fix = f"did you mean {prefix}{close[0]}?" if close else "remove it"
            raise UserError(f"the config has an unknown field {prefix}{key}; {fix}")
        if isinstance(value, ConfigDict) != isinstance(reference[key], ConfigDict):
            kind = "a section" if isinstance(reference[key], ConfigDict) else "a value"
            raise UserError(f"{prefix}{key}: expected {kind}, as in configs/miniature.py")
        if isinstance(value, ConfigDict) and key not in FREE:
            check_shape(value, reference[key], f"{prefix}{key}.")


def check_values(config: ConfigDict) -> None:
    """Raises UserError for the first value that no stage could work with; the message names the field and the fix."""
    for name, value in fields(config):
        leaf = name.rsplit(".", 1)[-1]
        if isinstance(value, numbers.Real) and not isinstance(value, bool) and leaf not in MAY_BE_NEGATIVE:
            free = any(part in FREE for part in name.split("."))
            zero_allowed = leaf in MAY_BE_ZERO or free
            if not value >= 0 or (value == 0 and not zero_allowed):
                raise UserError(f"{name}: expected a number {'from 0 up' if zero_allowed else 'above 0'}, got {value}")
            if leaf in SHARES and value > 1:
                raise UserError(f"{name}: expected a share between 0 and 1, got {value}")
        if name in CHOICES and value not in CHOICES[name]:
            raise UserError(f"{name}: expected one of {', '.join(map(str, CHOICES[name]))}, got {value!r}")
    if not config.run_dir:
        raise UserError("run_dir: expected a folder, got ''; for example --config.run_dir=runs/mine")
    for section in ("seed_degree", "subgraph_nodes"):
        low_high = tuple(config.synthesis[section])
        if len(low_high) != 2 or not 0 < low_high[0] <= low_high[1]:
            raise UserError(f"synthesis.{section}: expected (low, high) with 0 < low <= high, got {low_high}")
    if config.ppo.staleness and not config.ppo.tis_cap:
        raise UserError(
            "ppo.tis_cap: expected a number above 0 where ppo.staleness is 1 (episodes of older weights are weighed "
            "by what the present ones make of them), got 0; for example --config.ppo.tis_cap=2"
        )
    _check_sampler(config.sampler, config.placement)
    first, last = (*config.profile.steps, 0, 0)[:2]
    if len(config.profile.steps) != 2 or not 0 <= first <= last:
        raise UserError(f"profile.steps: expected (first, last), or (0, 0) for none, got {tuple(config.profile.steps)}")
    try:
        datetime.date.fromisoformat(config.offline_web.as_of)
    except ValueError:
        raise UserError(
            f"offline_web.as_of: expected a date such as 2026-06-01, got {config.offline_web.as_of!r}"
        ) from None
    _check_model(config)
    for stage in STAGES:
        section = config[stage]
        if section.schedule not in SCHEDULES:
            raise UserError(f"{stage}.schedule: expected one of {', '.join(SCHEDULES)}, got {section.schedule!r}")
        if section.batch_size % section.microbatches:
            raise UserError(
                f"{stage}.microbatches: expected a divisor of {stage}.batch_size {section.batch_size}, got {section.microbatches}"
            )
        if not any(section.mixture.values()):
            raise UserError(f"{stage}.mixture: expected at least one component with a rate above 0")
    if not any(config.synthesis.kind_weights.values()):
        raise UserError("synthesis.kind_weights: expected at least one kind with a weight above 0")
    if config.agent.max_turn_tokens > config.agent.max_episode_tokens:
        raise UserError(
            f"agent.max_turn_tokens: expected at most agent.max_episode_tokens {config.agent.max_episode_tokens}, "
            f"got {config.agent.max_turn_tokens}"
        )


def _check_sampler(sampler: ConfigDict, placement: ConfigDict) -> None:
    if sampler.engine == "jax":
        return
    if not sampler.urls or not all(str(url).startswith(("http://", "https://")) for url in sampler.urls):
        raise UserError(
            f"sampler.urls: expected addresses of {sampler.engine} servers, got {tuple(sampler.urls)}; for example "
            "--config.sampler.urls=\"('http://10.0.0.5:8000',)\""
        )
    if sampler.engine == "vllm" and not sampler.model:
        raise UserError(
            "sampler.model: expected the name of the model at the vLLM servers (--served-model-name), got ''"
        )
    if placement.sampler != "colocated":
        raise UserError(
            f"placement.sampler: expected colocated where sampler.engine is {sampler.engine} (servers take no device of this "
            f"process), got {placement.sampler}"
        )


def _check_model(config: ConfigDict) -> None:
    model = config.model
    if model.num_heads % model.num_kv_heads:
        raise UserError(
            f"model.num_kv_heads: expected a divisor of model.num_heads {model.num_heads}, got {model.num_kv_heads}"
        )
    if model.head_dim % 2:
        raise UserError(f"model.head_dim: expected an even number (rotary halves), got {model.head_dim}")
    if config.tokenizer.vocab_size < 300:
        raise UserError(
            f"tokenizer.vocab_size: expected at least 300 (256 bytes and the control tokens), "
            f"got {config.tokenizer.vocab_size}"
        )
