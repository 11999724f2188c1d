"""Asks a question: the trained checkpoint (or a model at an endpoint) researches it and writes a cited answer.

Thoughts, tool calls and results appear in the terminal as they happen; the answer is written as Markdown and HTML.

    python -m launch.research "Which of Austria's neighbours use the euro?"
    python -m launch.research "奥地利的首都是什么？" --stage=sft
    python -m launch.research "..." --endpoint=http://localhost:8000/v1 --model=my-model
"""

import asyncio
import os
from pathlib import Path

import rich.console
from absl import flags

from launch import entry, tool_host
from stepdr_jax.agent.budget import Limits
from stepdr_jax.agent.policy import EndpointPolicy
from stepdr_jax.errors import UserError
from stepdr_jax.orchestration import ask
from stepdr_jax.runtime import stages
from stepdr_jax.runtime.layout import RunLayout

FLAGS = flags.FLAGS
flags.DEFINE_string("stage", "", f"checkpoint that answers: {', '.join(stages.policies())}; default the last finished")
flags.DEFINE_string("endpoint", "", "OpenAI-compatible base URL of a model that answers instead")
flags.DEFINE_string("model", "", "model name at the endpoint")
flags.DEFINE_integer("seed", 0, "sampling seed; another seed gives another attempt")
flags.DEFINE_float("temperature", None, "sampling temperature; default eval.temperature of the config", lower_bound=0.0)
flags.DEFINE_string("as_of", "", "the date the agent is told, as 2026-06-01; default offline_web.as_of of the config")
flags.DEFINE_string("out", "", "folder for answer.md and answer.html; default a folder in run_dir/research")


def main(config) -> None:
    question = ask.clean_question(entry.arguments())
    as_of = FLAGS.as_of or config.offline_web.as_of
    temperature = config.eval.temperature if FLAGS.temperature is None else FLAGS.temperature
    console = rich.console.Console(highlight=False)
    if FLAGS.endpoint:
        if not FLAGS.model:
            raise UserError("--endpoint needs --model=NAME, the model's name there")
        key = os.environ.get(config.teacher.api_key_env, "")
        answerer = EndpointPolicy(FLAGS.endpoint, FLAGS.model, key, temperature=temperature)
        prompt, limits, topk, shown_chars = "full", ask.ENDPOINT_LIMITS, 5, 6_000
    else:
        stage = ask.choose_stage(config, FLAGS.stage)
        answerer = ask.trained_policy(config, stage, question, as_of, temperature)
        prompt, limits = config.agent.prompt, Limits.from_config(config.agent)
        topk, shown_chars = config.tools.topk, config.tools.max_observation_chars
    asked = ask.task(question, as_of)
    console.print(f"{answerer.name} is asked: ", style="bold", end="")
    console.print(question, markup=False)

    def run(address: str):
        return asyncio.run(
            ask.ask(
                asked,
                answerer,
                address,
                limits,
                prompt=prompt,
                seed=FLAGS.seed,
                call_timeout=config.tools.call_timeout,
                on_event=ask.show(console),
            )
        )

    if config.tools.address:
        trajectory = run(config.tools.address)
    else:
        # Here: a person who asks through a running tool host needs none of its packages.
        from tools_env.offline_web.build import build_offline_web

        build_offline_web(
            RunLayout.from_config(config).offline_web, seed=config.data_seed, documents=config.offline_web.documents
        )
        with tool_host.start(config, "research", topk=topk, max_observation_chars=shown_chars) as host:
            trajectory = run(host.address)
    out = Path(FLAGS.out) if FLAGS.out else ask.folder(config, asked, answerer.name, FLAGS.seed)
    paths = ask.write(trajectory, question, out)
    console.print(ask.summary(trajectory), soft_wrap=True)
    for path in paths:
        console.print(str(path), markup=False, soft_wrap=True)


if __name__ == "__main__":
    entry.run(main, __doc__, positional="QUESTION")
