"""The reflection loop (paper section 3.3.1): a wrong answer is reconsidered, at most three times.

A correct first attempt is used as it is. After a wrong one the policy is told only that it is wrong, keeps its history
and tries again. Signs of that prompt are removed afterwards, so that the correction looks spontaneous: the turn with
the wrong answer becomes a doubt inside the next thought, the prompt to reflect and the sentences that mention it are
deleted.
"""

import re
from collections.abc import Awaitable, Callable

from stepdr_jax.agent.policy import Policy, PolicySession
from stepdr_jax.records import Finish, Message, Trajectory, Verdict
from stepdr_jax.text.citations import strip_citations

REFLECT = {
    "en": "Your answer is incorrect. Think about what went wrong, check the sources again and answer anew.",
    "zh": "你的回答不正确。请反思哪里出错，重新核对来源，再次回答。",
}
DOUBT = {"en": "{answer} Is that right? ", "zh": "{answer}对吗？"}
INDUCTION = re.compile(
    r"according to (?:the |your )?(?:user'?s? )?(?:hint|feedback|prompt|reminder|correction)"
    r"|(?:the user|you) (?:pointed|point|told|tell|said|say|mentioned|indicated|noted)"
    r"|my (?:previous|last|earlier|first) answer (?:was|is) (?:marked |judged )?(?:wrong|incorrect)"
    r"|(?:as|since) (?:you|the user) (?:said|noted|pointed)|the (?:hint|feedback) (?:says|suggests)"
    r"|was told|the correct answer is|answer is incorrect"
    r"|根据(?:用户|你|您)?的?(?:提示|反馈|提醒|指正)|(?:用户|你|您)(?:指出|提示|提到|说我|告诉)|正确答案(?:是|应)|回答(?:不正确|错误|有误)",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"(?<=[。！？\n])|(?<=[.!?])(?=\s)")
_THOUGHT = re.compile(r"<think>(.*?)</think>\n?", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


class ContinuedPolicy:
    """A policy that starts with an earlier attempt in its context."""

    def __init__(self, policy: Policy, earlier: Trajectory, prompt: str) -> None:
        self.name = policy.name
        self.policy = policy  # the policy that acts
        self._earlier, self._prompt = earlier, prompt

    def start(self, messages: list[Message], *, episode_id: str, seed: int) -> PolicySession:
        history = [
            Message(role="user", content=f"<tool_response>\n{message.content}\n</tool_response>")
            if message.role == "tool"
            else Message(role=message.role, content=message.content)
            for message in self._earlier.messages[len(messages) :]
        ]
        told = [*messages, *history, Message(role="user", content=self._prompt)]
        return self.policy.start(told, episode_id=episode_id, seed=seed)


def remove_induction(text: str) -> str:
    """Deletes the sentences of the thought and of plain text that mention a hint; calls and the answer stay."""
    kept, position = [], 0
    for block in re.finditer(r"<tool_call>.*?</tool_call>|<answer>.*?</answer>", text, re.DOTALL):
        kept += [_clean(text[position : block.start()]), block.group()]
        position = block.end()
    return "".join([*kept, _clean(text[position:])]).strip()


def _clean(text: str) -> str:
    if not INDUCTION.search(text):
        return text
    pieces = re.split(r"(</?think>)", text)
    for index, piece in enumerate(pieces):
        if not piece.startswith("<"):
            pieces[index] = "".join(s for s in _SENTENCE_END.split(piece) if not INDUCTION.search(s)).strip(" ")
    return "".join(pieces).replace("<think></think>\n", "").replace("<think></think>", "")


def has_induction(trajectory: Trajectory) -> bool:
    """Whether anything the assistant wrote, its answer included, still mentions a hint."""
    return any(m.role == "assistant" and INDUCTION.search(m.content) for m in trajectory.messages)


def merge_attempts(earlier: Trajectory, later: Trajectory, lang: str) -> Trajectory:
    """Joins two attempts into one episode in which the correction looks like the agent's own.

    `earlier` ends in a wrong answer; `later` was made by `ContinuedPolicy` and begins with system and user messages.
    """
    if earlier.finish != Finish.ANSWERED:
        raise ValueError(f"expected an attempt that answered, got finish {earlier.finish}")
    *before, wrong = earlier.messages
    first = next(index for index, message in enumerate(later.messages) if message.role == "assistant")
    answer = _ANSWER.search(wrong.content)
    lines = strip_citations(answer.group(1) if answer else "").strip().splitlines()
    doubt = DOUBT[lang].format(answer=" ".join(line for line in lines if not line.startswith("#")))
    messages = [*before, *(message.model_copy() for message in later.messages[first:])]
    turn = messages[len(before)]
    cleaned = remove_induction(turn.content)
    thought = _THOUGHT.search(cleaned)
    rest = cleaned.replace(thought.group(), "", 1) if thought else cleaned
    turn.content = f"<think>{doubt}{thought.group(1).strip() if thought else ''}".rstrip() + f"</think>\n{rest}"
    for message in messages[len(before) + 1 :]:
        if message.role == "assistant":
            message.content = remove_induction(message.content)
    merged = later.model_copy(deep=True)
    merged.messages = renumber_calls(messages)
    merged.stats = {name: earlier.stats.get(name, 0.0) + value for name, value in later.stats.items()}
    merged.stats["turns"] = float(sum(message.role == "assistant" for message in messages))
    return merged


def renumber_calls(messages: list[Message]) -> list[Message]:
    """Gives tool calls the ids "<turn>.<position>" again, and their results the same."""
    result, turn, position, fresh = [], -1, 0, []
    for message in messages:
        message = message.model_copy()
        if message.role == "assistant":
            turn, position = turn + 1, 0
            message.tool_calls = [
                call.model_copy(update={"id": f"{turn}.{index}"}) for index, call in enumerate(message.tool_calls)
            ]
            fresh = [call.id for call in message.tool_calls]
        elif message.role == "tool" and message.tool_call_id is not None:
            message.tool_call_id = fresh[position] if position < len(fresh) else None
            position += 1
        result.append(message)
    return result


async def solve_with_reflection(
    lang: str,
    policy_for: Callable[[int], Policy],
    run: Callable[[Policy, int], Awaitable[Trajectory]],
    judge: Callable[[Trajectory], Awaitable[Verdict]],
    good: Callable[[Verdict], bool],
    max_reflections: int,
) -> tuple[Trajectory, Verdict]:
    """Runs attempt 0 and up to `max_reflections` reflected ones; returns the last episode, cleaned, and its verdict.

    Args:
        lang: language of the task.
        policy_for: attempt number -> the policy that acts.
        run: runs one episode of the task with a policy and an attempt number.
        judge: judges an episode; a judge that failed ends the loop.
        good: whether a verdict makes the episode a positive sample.
    """
    trajectory = await run(policy_for(0), 0)
    verdict = await judge(trajectory)
    for attempt in range(1, max_reflections + 1):
        if good(verdict) or verdict.reward is None or trajectory.finish != Finish.ANSWERED:
            break
        later = await run(ContinuedPolicy(policy_for(attempt), trajectory, REFLECT[lang]), attempt)
        if later.finish != Finish.ANSWERED:
            break
        trajectory = merge_attempts(trajectory, later, lang)
        trajectory.attempt = attempt
        verdict = await judge(trajectory)
    return trajectory, verdict
