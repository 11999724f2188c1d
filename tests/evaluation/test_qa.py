"""Held-out evaluation: which tasks, which rows, what is missing and what a resumed run repeats."""

import asyncio
import random

import pytest

from stepdr_jax.agent.budget import Limits
from stepdr_jax.agent.policy import Turn
from stepdr_jax.errors import UserError
from stepdr_jax.evaluation import qa, results
from stepdr_jax.judge.judges import ProgrammaticJudge
from stepdr_jax.records import Answer, Rubric, RubricSet, Task
from tools_env.client import CitedSource, ToolInfraError, ToolResult

LIMITS = Limits(max_turns=4, max_turn_tokens=64, max_episode_tokens=512, max_tool_calls=4, wall_seconds=30.0)
CALL = '<tool_call>\n{"name": "batch_web_surfer", "arguments": {"queries": ["capital"]}}\n</tool_call>'
ANSWER = "<answer>The capital is Vienna. \\cite{web_bakotefi}</answer>"


def task(name, kind="fact", lang="en", split="heldout"):
    return Task(id=name, kind=kind, lang=lang, query="capital?", answer=Answer(value="Vienna"), split=split)


def rubrics(*tasks):
    check = {"kind": "states", "any": ["Vienna"]}
    rubric = Rubric(rid="a", criterion="states it", weight=1, role="explicit", check=check)
    return {t.id: RubricSet(id=f"r{t.id}", task_id=t.id, rubrics=[rubric]) for t in tasks}


class Policy:
    """Searches, then answers; `broken` episodes (by sampling seed) fail the given number of times first."""

    name = "scripted"

    def __init__(self, broken=None):
        self.broken, self.started = dict(broken or {}), []

    def start(self, messages, *, episode_id, seed):
        self.started.append(seed)
        return Session(self, seed)


class Session:
    log = None

    def __init__(self, policy, seed):
        self.policy, self.seed, self.turns = policy, seed, 0

    async def act(self, max_tokens):
        if self.policy.broken.get(self.seed, 0) > 0:
            self.policy.broken[self.seed] -= 1
            raise RuntimeError("engine is gone")
        self.turns += 1
        return Turn(CALL if self.turns == 1 else ANSWER, "stop")

    async def observe(self, texts, *, tail=""):
        pass

    async def close(self):
        pass


class Tools:
    async def open_session(self, episode_id, **budgets):
        return self

    async def call(self, tool, arguments, *, call_id, timeout=None):
        source = CitedSource("web_bakotefi", "http://atlas.test/at", "Austria", "The capital is Vienna.", 2, None)
        return ToolResult("ok", source.text, (source,), False, False, {})

    async def close(self):
        pass


async def tools():
    return Tools()


def run(tasks, policy, judge=None, **settings):
    async def work():
        return await qa.run_tasks(
            tasks, rubrics(*tasks), policy, tools, judge or ProgrammaticJudge(), LIMITS, stage="sft", seed=0, **settings
        )

    return asyncio.run(work())


def test_selection_keeps_the_proportions_and_ignores_the_order_of_the_file():
    pool = [task(f"f{i}") for i in range(60)] + [task(f"d{i}", "deep_search") for i in range(30)]
    pool += [task(f"z{i}", lang="zh") for i in range(30)] + [task(f"t{i}", split="train") for i in range(50)]
    chosen = qa.select_tasks(pool, 40)
    kinds = [(t.kind, t.lang) for t in chosen]
    assert [kinds.count(k) for k in (("fact", "en"), ("deep_search", "en"), ("fact", "zh"))] == [20, 10, 10]
    shuffled = random.Random(0).sample(pool, len(pool))
    assert [t.id for t in qa.select_tasks(shuffled, 40)] == [t.id for t in chosen]


def test_selection_of_more_than_there_are_takes_all_heldout():
    pool = [task(f"f{i}") for i in range(5)] + [task("t", split="train")]
    assert len(qa.select_tasks(pool, 50)) == 5


def test_selection_fills_the_count_exactly():
    pool = [task(f"{kind}{i}", kind) for kind in ("fact", "deep_search", "report") for i in range(7)]
    assert [len(qa.select_tasks(pool, count)) for count in (1, 2, 10, 20)] == [1, 2, 10, 20]


def test_no_tasks_is_a_user_error():
    with pytest.raises(UserError, match=r"eval\.tasks"):
        qa.select_tasks([task("a")], 0)


def test_rows_carry_reward_counts_and_index_order():
    rows = run([task("a"), task("b")], Policy(), samples=2, price=2.0)
    assert [row.index for row in rows] == [0, 1, 2, 3]
    assert [(row.task_index, row.sample) for row in rows] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(row.reward == 1.0 and row.correct and row.cited and row.turns == 2 for row in rows)
    assert all(row.missing is None and row.finish == "answered" and row.attempts == 1 for row in rows)


def test_sampling_seed_depends_on_task_and_sample_only():
    one, two = Policy(), Policy()
    run([task("a"), task("b")], one, concurrency=1)
    run([task("a"), task("b")], two, samples=2, concurrency=4)
    assert set(one.started) <= set(two.started)
    assert len(set(two.started)) == 4


def test_a_broken_episode_is_tried_again():
    rows = run([task("a")], Policy({0: 1}))
    assert rows[0].reward == 1.0 and rows[0].attempts == 2


def test_an_episode_that_stays_broken_is_missing_and_never_zero():
    rows = run([task("a"), task("b")], Policy({0: 9}))
    assert rows[0].reward is None and "engine is gone" in rows[0].missing
    assert rows[0].finish == "infra_failed"
    assert results.measure(rows, results.BY_NAME["reward"]).mean == 1.0
    assert list(results.missing_causes(rows).values()) == [1]


def test_a_failing_judge_is_missing_too():
    class Broken:
        async def judge(self, *args):
            raise ToolInfraError("judge is gone")

    rows = run([task("a")], Policy(), judge=Broken())
    assert rows[0].reward is None and "judge is gone" in rows[0].missing and rows[0].finish == "judge_failed"


def test_finished_rows_are_not_run_again():
    tasks = [task("a"), task("b")]
    first = run(tasks, Policy())
    again = Policy()
    rows = run(tasks, again, finished=first[:1])
    assert again.started == [qa.sampling_seed(1, 0)]
    assert rows[0] is first[0] and len(rows) == 2


def test_rows_survive_the_file(tmp_path):
    from stepdr_jax import records

    rows = run([task("a"), task("b")], Policy())
    records.write_records(tmp_path / "sft.jsonl", reversed(rows))
    assert results.read_results(tmp_path / "sft.jsonl") == rows


def test_an_interrupted_evaluation_keeps_whole_measured_rows_of_the_same_settings(tmp_path):
    from stepdr_jax import files

    partial = tmp_path / "sft.partial.jsonl"
    rows = run([task("a"), task("b"), task("c")], Policy({1000: 9}), fingerprint="now")
    assert rows[1].missing
    for row in rows:
        files.append_jsonl(partial, row.model_dump(mode="json", exclude_defaults=True))
    files.append_jsonl(partial, {"fingerprint": "before", "of": "another layout"})
    with open(partial, "a") as out:
        out.write('{"fingerprint": "now", "ind')
    assert qa._kept(partial, "now") == [rows[0], rows[2]]
