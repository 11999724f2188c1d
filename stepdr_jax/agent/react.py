"""The one episode loop: teacher synthesis, reinforcement-learning rollouts, evaluation and a user's own question.

    prompt -> (thought, tool calls -> observations)* -> answer

Two error planes. What the policy did (malformed call, unknown tool, budget gone) is answered with an observation it
can learn from, and ends, if it ends the episode, as a policy outcome. What the system broke (tool host, engine, wall
clock) ends it as an infrastructure outcome with its cause in the metadata; such episodes are masked, never rewarded 0.
`run_episode` therefore does not raise: it returns an Episode whose `finish` says what happened, cancellation included.
"""

import asyncio
import contextlib
import dataclasses
import time
import traceback
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from stepdr_jax.agent import prompts
from stepdr_jax.agent.budget import Account, Limits
from stepdr_jax.agent.policy import Policy, PolicySession
from stepdr_jax.records import Finish, Message, ObservedSource, Task, ToolCall, Trajectory
from stepdr_jax.tokens import chat
from stepdr_jax.tokens.log import TokenLog
from tools_env.client import ToolInfraError

if TYPE_CHECKING:
    from tools_env.client import ToolsClient, ToolSession

CLOSE_SECONDS = 5.0  # a session that cannot be closed in this time is left to the server's own deadline


@dataclasses.dataclass(frozen=True)
class Event:
    """What just happened, for a live view. `kind`: thought, call, observation, format_error, answer or finish.

    `error` is an observation's outcome, what is wrong with a malformed turn (`text` is the turn), or the cause of a
    finish that the system is to blame for.
    """

    kind: str
    turn: int
    text: str
    call: ToolCall | None = None
    sources: tuple[ObservedSource, ...] = ()
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Episode:
    """A finished episode. `log` is None for policies without tokens (endpoints, the offline expert)."""

    trajectory: Trajectory
    log: TokenLog | None


@dataclasses.dataclass
class _State:
    """What survives an exception in the middle of an episode."""

    messages: list[Message]
    account: Account
    policy: PolicySession | None = None
    tools: "ToolSession | None" = None
    answer: str | None = None


async def run_episode(
    task: Task,
    policy: Policy,
    tools: "ToolsClient",
    limits: Limits,
    *,
    prompt: str = "compact",
    as_of: str = "",
    seed: int = 0,
    on_event: Callable[[Event], Any] | None = None,
) -> Episode:
    """Runs one episode to its end.

    Args:
        task: the question; only its query and language reach the policy.
        policy: who acts.
        tools: client of the tool host; one tool session is opened for the episode.
        limits: budgets. Tokens are enforced where the policy's session counts them (`context_tokens`).
        prompt: style of the system prompt, "compact" or "full".
        as_of: the date the agent is told; empty takes the task's.
        seed: of sampling and of the tool session; the caller makes it different for every episode.
        on_event: called synchronously with each Event.

    Returns:
        The trajectory (also of failed and cancelled episodes, as far as it came) and its token log. A cancelled episode
        returns with `Finish.CANCELLED` instead of raising; a caller that awaits it in the cancelled task itself sees
        that in `finish`.
    """
    # Unique: a repeated episode must not meet an old tool session, its spent budget and its remembered replies.
    episode_id = f"{task.id}.{seed}.{uuid.uuid4().hex[:8]}"
    began = time.monotonic()
    state = _State([], Account(limits))
    emit = on_event or (lambda event: None)
    metadata: dict[str, Any] = {"seed": seed}
    try:
        async with asyncio.timeout(limits.wall_seconds) as clock:
            finish = await _run(state, task, policy, tools, prompt, as_of, seed, episode_id, emit)
    except asyncio.CancelledError:
        finish = Finish.CANCELLED
    except TimeoutError as error:
        finish = Finish.WALL_CLOCK if clock.expired() else Finish.INFRA_FAILED
        metadata["cause"] = f"wall clock of {limits.wall_seconds:g} s" if clock.expired() else _cause(error)
    except ToolInfraError as error:
        finish = Finish.INFRA_FAILED
        metadata["cause"] = f"tools: {error}"
    except Exception as error:
        finish = Finish.INFRA_FAILED
        metadata["cause"] = _cause(error)
    await _close(state)
    emit(Event("finish", state.account.turns, str(finish), error=metadata.get("cause")))

    log = state.policy.log if state.policy is not None else None
    stats = state.account.stats(answered=finish == Finish.ANSWERED) | _token_counts(state.policy, log)
    stats["wall_seconds"] = time.monotonic() - began
    name = getattr(policy, "name", type(policy).__name__)
    trajectory = Trajectory(
        id=f"{task.id}.{name}.{seed}",
        task_id=task.id,
        policy=name,
        messages=state.messages,
        finish=finish,
        answer=state.answer,
        stats=stats,
        metadata=metadata,
    )
    return Episode(trajectory, log)


async def _run(state, task, policy, tools, prompt, as_of, seed, episode_id, emit) -> Finish:
    account, limits = state.account, state.account.limits
    specs = await tools.list_tools() if prompt == "full" else ()
    system = prompts.system_prompt(prompt, as_of or task.as_of, specs, task.lang)
    state.messages += [Message(role="system", content=system), Message(role="user", content=task.query)]
    state.tools = await tools.open_session(
        episode_id, max_tool_calls=limits.max_tool_calls, wall_seconds=limits.wall_seconds, seed=seed
    )
    state.policy = policy.start(list(state.messages), episode_id=episode_id, seed=seed)

    while True:
        room = account.turn_tokens(getattr(state.policy, "context_tokens", None))
        if room <= 0:
            return Finish.MAX_TOKENS
        turn = await state.policy.act(room)
        if turn.finish == "full" and not turn.text:
            return Finish.MAX_TOKENS
        number = account.turns
        account.turns += 1
        parsed = chat.parse_assistant(turn.text, turn=number)
        if parsed.thought:
            emit(Event("thought", number, parsed.thought))
        calls = list(parsed.tool_calls)
        message = Message(role="assistant", content=turn.text, tool_calls=calls)
        state.messages.append(message)

        if parsed.answer is not None and parsed.error is None:
            state.answer = parsed.answer
            emit(Event("answer", number, parsed.answer))
            return Finish.ANSWERED
        if turn.finish == "full" or (turn.finish == "length" and room < limits.max_turn_tokens):
            return Finish.MAX_TOKENS

        error = _format_error(parsed, calls, turn, room, task.lang)
        if error:
            message.error = "format"
            account.record_format_error()
            emit(Event("format_error", number, turn.text, error=error))
        if account.turns >= limits.max_turns:
            return Finish.FORMAT if error else Finish.MAX_TURNS
        if calls and not error and account.calls_exhausted:
            return Finish.BUDGET

        if error:
            text = prompts.FORMAT_ERROR[task.lang].format(error=error)
            texts = [text]
            state.messages.append(Message(role="tool", content=text))
        else:
            texts = [await _call(state, call, number, emit) for call in calls]  # in order: a file is written, then read
        tail = prompts.ANSWER_NOW[task.lang] if account.must_answer else ""
        if tail:
            state.messages.append(Message(role="user", content=tail))
        await state.policy.observe(texts, tail=tail)


def _format_error(parsed, calls: list[ToolCall], turn, room: int, lang: str) -> str | None:
    """What is wrong with a turn that is not an answer, in words for the policy; None if its calls can be made."""
    if turn.finish == "length" and (parsed.error or not calls):
        return prompts.CUT_TURN[lang].format(tokens=room)
    return parsed.error


async def _call(state: _State, call: ToolCall, turn: int, emit) -> str:
    """Makes one call and records its observation. Raises ToolInfraError when the tool host is broken."""
    emit(Event("call", turn, chat.tool_call_text(call.name, call.arguments), call=call))
    timeout = state.account.limits.call_timeout
    result = await state.tools.call(call.name, call.arguments, call_id=call.id, timeout=timeout)
    state.account.record_call(result.outcome)
    error = None if result.outcome == "ok" else result.outcome
    sources = [ObservedSource(**dataclasses.asdict(source)) for source in result.sources]
    state.messages.append(Message(role="tool", content=result.text, tool_call_id=call.id, sources=sources, error=error))
    emit(Event("observation", turn, result.text, call=call, sources=tuple(sources), error=error))
    return result.text


async def _close(state: _State) -> None:
    """Frees the engine's slot and the tool session; a failure here says nothing about the episode."""
    for session in (state.policy, state.tools):
        if session is not None:
            with contextlib.suppress(Exception, asyncio.CancelledError):
                await asyncio.wait_for(session.close(), CLOSE_SECONDS)


def _token_counts(session: PolicySession | None, log: TokenLog | None) -> dict[str, float]:
    if log is not None:
        return {"sampled_tokens": float(log.sampled_count), "observed_tokens": float(len(log) - log.sampled_count)}
    sampled = getattr(session, "sampled_tokens", None)
    context = getattr(session, "context_tokens", None)
    if sampled is None or context is None:
        return {}
    return {"sampled_tokens": float(sampled), "observed_tokens": float(context - sampled)}


def _cause(error: BaseException) -> str:
    """The exception and the line that raised it: enough to find a bug that hides as a broken engine."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {error}{where}"
