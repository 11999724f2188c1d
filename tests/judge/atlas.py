"""A task about a capital, its rubrics and an observed page."""

from stepdr_jax.records import Answer, ObservedSource, Rubric, RubricSet, Task

ATLAS = ObservedSource(
    id="web_bakotefi", url="http://atlas.test/en/austria", text="The capital of Austria is Vienna.", authority=2
)

TASK = Task(
    id="t",
    kind="fact",
    lang="en",
    query="What is the capital of Austria?",
    answer=Answer(value="Vienna", aliases=["Wien"]),
)

RUBRICS = RubricSet(
    id="r",
    task_id="t",
    rubrics=[
        Rubric(
            rid="value",
            criterion="States it",
            weight=5,
            role="explicit",
            check={"kind": "states", "any": ["Vienna", "Wien"]},
        ),
        Rubric(
            rid="support",
            criterion="Cites it",
            weight=3,
            role="explicit",
            check={"kind": "cites_support", "any": ["Vienna"], "about": ["Austria"]},
        ),
        Rubric(rid="authority", criterion="Authority", weight=2, role="implicit", check={"kind": "authoritative"}),
        Rubric(rid="unresolved", criterion="Bad id", weight=-3, role="negative", check={"kind": "unresolved_citation"}),
        Rubric(rid="degenerate", criterion="Loops", weight=-2, role="negative", check={"kind": "degenerate"}),
    ],
)
