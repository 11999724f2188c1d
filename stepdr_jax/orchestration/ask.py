"""One person's question: which policy answers it, what the terminal shows meanwhile, and the pages it leaves behind."""

import datetime
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import rich.console
import rich.text
from ml_collections import ConfigDict

from stepdr_jax import files
from stepdr_jax.agent import policy, prompts, react
from stepdr_jax.agent.budget import Limits
from stepdr_jax.errors import UserError
from stepdr_jax.progress import clock
from stepdr_jax.records import Finish, Message, Task, Trajectory
from stepdr_jax.reporting import research_page
from stepdr_jax.runtime import stages
from stepdr_jax.runtime.layout import RunLayout
from stepdr_jax.text.scripts import question_language
from tools_env.client import ToolsClient

# A large model behind an endpoint: the recipe's evaluation settings (30 turns, 16K tokens a turn, 128K context).
ENDPOINT_LIMITS = Limits(
    max_turns=30, max_turn_tokens=16_384, max_episode_tokens=131_072, max_tool_calls=60, wall_seconds=1_800.0
)
OBSERVATION_LINES = 12  # of a tool result shown in the terminal; the written pages have them all
OUTCOMES = {"tool_error": "tool error", "bad_arguments": "bad arguments", "budget_exhausted": "no calls left"}
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # pages must not steer the terminal


def clean_question(words: list[str]) -> str:
    """Joins the words of a command line into the question; bytes that are no UTF-8 become replacement characters."""
    text = " ".join(words).encode("utf-8", "surrogateescape").decode("utf-8", "replace").strip()
    if not text:
        raise UserError('expected a question, for example python -m launch.research "What is the capital of Austria?"')
    return text


def task(question: str, as_of: str) -> Task:
    """The question as a task. Raises UserError when `as_of` is not an ISO date."""
    try:
        datetime.date.fromisoformat(as_of)
    except ValueError:
        raise UserError(f"--as_of: expected a date such as 2026-06-01, got {as_of!r}") from None
    digest = hashlib.sha256(question.encode()).hexdigest()[:10]
    return Task(id=f"ask-{digest}", kind="report", lang=question_language(question), query=question, as_of=as_of)


def choose_stage(config: ConfigDict, wanted: str = "") -> str:
    """Returns the stage whose checkpoint answers: `wanted`, or the last one that is finished.

    Raises UserError when there is none, with the command that makes one.
    """
    layout, known = RunLayout.from_config(config), stages.policies()
    if wanted and wanted not in known:
        raise UserError(f"--stage: expected one of {', '.join(known)}, got {wanted!r}")
    for stage in [wanted] if wanted else reversed(known):
        if layout.stage(stage).done.exists():
            return stage
    what = f"no finished {wanted} checkpoint" if wanted else "no trained checkpoint"
    raise UserError(
        f"{what} in {layout.seed_dir()}; run bash launch/quickstart.sh first, or ask your own model with --endpoint "
        "and --model"
    )


def trained_policy(
    config: ConfigDict, stage: str, question: str, as_of: str, temperature: float
) -> policy.EnginePolicy:
    """The run's checkpoint of `stage` in the JAX sampler. Raises UserError when the question leaves it no room."""
    from stepdr_jax.engine import factory  # here, so that endpoint users need no jax
    from stepdr_jax.tokens import chat
    from stepdr_jax.tokens.tokenizer import Tokenizer
    from stepdr_jax.training import sampler

    tokenizer = Tokenizer.load(RunLayout.from_config(config).tokenizer)
    asked = task(question, as_of)
    system = prompts.system_prompt(config.agent.prompt, as_of, (), asked.lang)
    messages = [Message(role="system", content=system), Message(role="user", content=question)]
    used = len(chat.prompt_ids(tokenizer, messages))
    room = config.agent.max_episode_tokens - 2 * config.agent.max_turn_tokens
    if used > room:
        raise UserError(
            f"the question takes {used} tokens, this model's context has room for {room}; ask it in fewer words"
        )
    engine, tokenizer = sampler.load_stage_engine(factory.with_max_num_seqs(config, 1), stage)
    return policy.EnginePolicy(engine, tokenizer, temperature, name=stage)


async def ask(
    asked: Task,
    answerer: policy.Policy,
    address: str,
    limits: Limits,
    *,
    prompt: str,
    seed: int,
    call_timeout: float,
    on_event: Callable[[react.Event], None],
) -> Trajectory:
    """Runs the episode against the tool host at `address` and closes every connection."""
    tools = ToolsClient(address, call_timeout=call_timeout)
    try:
        await tools.wait_ready(min(call_timeout, 5.0))  # one of ours is healthy by now, a stranger's should be
        episode = await react.run_episode(
            asked, answerer, tools, limits, prompt=prompt, as_of=asked.as_of, seed=seed, on_event=on_event
        )
    finally:
        await tools.close()
        if isinstance(answerer, policy.EndpointPolicy):
            await answerer.close()
    if episode.trajectory.finish == Finish.CANCELLED:
        raise KeyboardInterrupt
    if episode.trajectory.finish == Finish.INFRA_FAILED:
        raise UserError(f"the question was not answered: {episode.trajectory.metadata['cause']}; ask it again")
    return episode.trajectory


def show(console: rich.console.Console) -> Callable[[react.Event], None]:
    """Returns the live view of an episode: thoughts, calls, observations and the answer as they come."""
    styles = {
        "thought": ("thinks", "italic"),
        "call": ("calls", "cyan"),
        "observation": ("reads", "dim"),
        "format_error": ("malformed turn", "yellow"),
        "answer": ("answers", "bold"),
    }

    def on_event(event: react.Event) -> None:
        if event.kind not in styles:
            return
        title, style = styles[event.kind]
        text = event.text
        if event.call is not None and event.kind == "call":
            text = f"{event.call.name} {json.dumps(event.call.arguments, ensure_ascii=False)}"
        lines = _CONTROL.sub("", text).strip().splitlines() or ["(nothing)"]
        if event.kind == "observation" and len(lines) > OBSERVATION_LINES:
            lines = [*lines[:OBSERVATION_LINES], f"... {len(lines) - OBSERVATION_LINES} more lines"]
        if event.error:
            title += f" ({_CONTROL.sub('', OUTCOMES.get(event.error, event.error))})"
        console.print(rich.text.Text(f"{event.turn + 1}. {title}", style="bold" if event.kind == "answer" else style))
        for line in lines:
            console.print(rich.text.Text("   " + line, style=style))

    return on_event


def write(trajectory: Trajectory, question: str, out: Path) -> list[Path]:
    """Writes answer.md, answer.html and episode.json into the folder `out`; returns their paths."""
    pages = {
        "answer.md": research_page.render_markdown(trajectory, question),
        "answer.html": research_page.render_html(trajectory, question),
        "episode.json": trajectory.model_dump_json(indent=1, exclude_defaults=True) + "\n",
    }
    try:
        for name, text in pages.items():
            files.write_atomic(out / name, text)
    except (NotADirectoryError, FileExistsError):
        raise UserError(f"--out: expected a folder, got {out}; name another") from None
    return [out / name for name in pages]


def folder(config: ConfigDict, asked: Task, name: str, seed: int) -> Path:
    """Where the pages of a question go by default: the same command writes the same place."""
    words = re.sub(r"[^a-z0-9]+", "-", asked.query.lower()).strip("-")[:40].strip("-")
    slug = "-".join(part for part in (words, asked.id.removeprefix("ask-")) if part)
    return RunLayout.from_config(config).research / f"{slug}-{re.sub(r'[^A-Za-z0-9.]+', '-', name)}-{seed}"


def summary(trajectory: Trajectory) -> str:
    """One line: how it ended and what it took."""
    stats = trajectory.stats
    ended = {
        Finish.ANSWERED: "answered",
        Finish.MAX_TURNS: "no answer: the turns were used up",
        Finish.MAX_TOKENS: "no answer: the context was full",
        Finish.BUDGET: "no answer: the tool calls were used up",
        Finish.FORMAT: "no answer: the last turn was malformed",
        Finish.WALL_CLOCK: "no answer: the time was up",
    }[trajectory.finish]
    tokens = f", {stats['sampled_tokens']:.0f} tokens written" if "sampled_tokens" in stats else ""
    sources = len(trajectory.sources())
    return (
        f"{ended}; {stats['turns']:.0f} turns, {stats['tool_calls']:.0f} tool calls, {sources} passages read{tokens}, "
        f"{clock(stats['wall_seconds'])}"
    )
