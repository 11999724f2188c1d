"""Made-up episodes for tests of cleaning and reflection."""

from stepdr_jax.records import Answer, Finish, Message, ObservedSource, PlanStep, Task, ToolCall, Trajectory
from stepdr_jax.tokens import chat

PASSAGE = "The capital of Austria is Vienna."

SOURCE = ObservedSource(id="web_bakotefi", url="http://atlas.test/en/austria", text=PASSAGE, authority=2)

TASK = Task(
    id="k",
    kind="fact",
    lang="en",
    query="What is the capital of Austria?",
    answer=Answer(value="Vienna"),
    plan=[PlanStep(goal="capital of Austria", query="capital of Austria")],
    as_of="2026-06-01",
)


def search(turn, query, thought="", content=None):
    arguments = {"queries": [query]}
    call = chat.tool_call_text("batch_web_surfer", arguments)
    said = f"<think>{thought}</think>\n{call}" if thought else call
    return Message(
        role="assistant",
        content=content or said,
        tool_calls=[ToolCall(id=f"{turn}.0", name="batch_web_surfer", arguments=arguments)],
    )


def shown(turn, text=PASSAGE + r" \cite{web_bakotefi}", sources=(SOURCE,), error=None):
    return Message(role="tool", content=text, tool_call_id=f"{turn}.0", sources=list(sources), error=error)


def episode(*turns, answer=PASSAGE + r" \cite{web_bakotefi}", finish=Finish.ANSWERED, task=TASK, id="t", **changes):
    turns = turns or (search(0, "capital of Austria"), shown(0))
    return Trajectory(
        id=id,
        task_id=task.id,
        policy="expert",
        finish=finish,
        answer=answer,
        messages=[
            Message(role="system", content="You are a research agent."),
            Message(role="user", content=task.query),
            *turns,
            Message(role="assistant", content=f"<answer>{answer}</answer>"),
        ],
        **changes,
    )
