"""Episodes to rewards and arrays: order, masking, what is trainable."""

import asyncio

import numpy as np
import pytest

from stepdr_jax.agent.budget import Limits
from stepdr_jax.agent.policy import EnginePolicy
from stepdr_jax.agent.tools import Tools
from stepdr_jax.engine.fake import FakeEngine
from stepdr_jax.records import Answer, Finish, Judgment, Rubric, RubricSet, Task, Trajectory, Verdict
from stepdr_jax.rl import reward, rollouts
from stepdr_jax.tokens import chat
from stepdr_jax.tokens.tokenizer import Tokenizer
from tests.agent.scripted import ANSWER, TableTools, broken, search

TOKENIZER = Tokenizer.train(["What is the capital of Austria? Vienna.", search("capital"), ANSWER], 400)
LIMITS = Limits(max_turns=3, max_turn_tokens=300, max_episode_tokens=2000, max_tool_calls=3, wall_seconds=30.0)
TASKS = [
    Task(id=f"t{i}", kind="fact", lang="en", query=f"capital {i}", answer=Answer(value="Vienna")) for i in range(5)
]
RUBRICS = {task.id: RubricSet(id="r" + task.id, task_id=task.id, rubrics=[]) for task in TASKS}


class Judge:
    """Gives `reward`, or raises it when it is an exception."""

    def __init__(self, given=0.75):
        self.given, self.judged = given, []

    async def judge(self, task, rubric_set, trajectory):
        self.judged.append(task.id)
        if isinstance(self.given, Exception):
            raise self.given
        judgment = Judgment(rid="a", weight=1, role="explicit", verdict="satisfied", score=1.0)
        return Verdict(reward=self.given, judgments=[judgment], correct=True, cited=True)


def searching_policy(texts=None):
    """Searches once, then answers; or says `texts` in turn."""
    texts = texts or [search("capital"), ANSWER]

    def script(session, ids, params):
        turn = min(sum(1 for id_ in ids if id_ == TOKENIZER.im_start) // 2 - 1, len(texts) - 1)
        return chat.assistant_ids(TOKENIZER, texts[turn])

    return EnginePolicy(FakeEngine(script, stop_ids=(TOKENIZER.im_end,), version=3), TOKENIZER)


def collect(tools, judge=None, policy=None, tasks=TASKS, **keywords):
    async def provide():
        return tools() if callable(tools) else tools

    return asyncio.run(
        rollouts.collect_rollouts(
            tasks,
            list(range(100, 100 + len(tasks))),
            policy or searching_policy(),
            provide,
            judge or Judge(),
            RUBRICS,
            LIMITS,
            **keywords,
        )
    )


def test_episodes_come_in_order_of_index_whatever_ends_first():
    class Slow(TableTools):
        async def call(self, *arguments, **keywords):
            for _ in range(50 if not self.calls else 0):
                await asyncio.sleep(0)
            return await super().call(*arguments, **keywords)

    first = Slow()
    hosts = iter([first, *(TableTools() for _ in range(4))])
    episodes = collect(lambda: next(hosts))
    assert [episode.index for episode in episodes] == [0, 1, 2, 3, 4]
    assert [episode.task.id for episode in episodes] == [task.id for task in TASKS]
    assert [episode.trajectory.metadata["seed"] for episode in episodes] == [100, 101, 102, 103, 104]


def test_exactly_the_sampled_tokens_are_trainable_through_the_real_episode_loop():
    episodes = collect(TableTools, tasks=TASKS[:2])
    assert [str(episode.trajectory.finish) for episode in episodes] == ["answered"] * 2
    batch = rollouts.rollout_arrays(episodes, 1024)
    sampled = chat.assistant_ids(TOKENIZER, search("capital")) + chat.assistant_ids(TOKENIZER, ANSWER)
    for row in range(2):
        assert batch.tokens_ET[row][batch.action_mask_ET[row]].tolist() == sampled
        assert batch.action_mask_ET[row].sum() < batch.lengths_E[row]
        assert batch.action_mask_ET[row, batch.lengths_E[row] - 1]  # nothing after the last sampled token is kept
        assert (batch.logprobs_ET[row][batch.action_mask_ET[row]] == -1).all()
    assert batch.rewards_E.tolist() == [0.75, 0.75] and batch.rewards_E.dtype == np.float32


def test_a_broken_host_is_tried_again_and_then_masked():
    calls = []

    def hosts():
        calls.append(1)
        return TableTools({"capital": broken()})

    episodes = collect(hosts, tasks=TASKS[:1])
    assert len(calls) == 2
    assert (episodes[0].scored.reward, episodes[0].masked) == (None, "infra_failed")
    batch = rollouts.rollout_arrays(episodes, 64)
    assert not batch.kept_E.any() and not batch.action_mask_ET.any() and batch.rewards_E[0] == 0


def test_a_judge_that_breaks_masks_and_does_not_score():
    judge = Judge(RuntimeError("judge is down"))
    episode = collect(TableTools, judge, tasks=TASKS[:1])[0]
    assert (episode.scored.reward, episode.masked) == (None, "judge_failed")
    assert "judge is down" in episode.trajectory.metadata["cause"]
    assert collect(TableTools, Judge(None), tasks=TASKS[:1])[0].masked == "judge_failed"


def test_what_the_policy_did_not_finish_is_zero_by_rule_and_not_judged():
    judge = Judge()
    policy = searching_policy(["nonsense"])
    episode = collect(TableTools, judge, policy, tasks=TASKS[:1])[0]
    assert episode.trajectory.finish == Finish.FORMAT
    assert (episode.scored.reward, episode.masked) == (0.0, None)
    assert episode.scored.verdict.correct is False
    assert judge.judged == []


def test_not_finishing_is_never_better_than_a_wrong_answer():
    weights = [5.0, 3.0, -3.0, -1.0]
    rubrics = RubricSet(
        id="r",
        task_id="t0",
        rubrics=[
            Rubric(rid=f"r{i}", criterion="c", weight=w, role="negative" if w < 0 else "explicit")
            for i, w in enumerate(weights)
        ],
    )
    assert reward.truncated_reward(rubrics, "worst") == -0.5
    assert reward.truncated_reward(rubrics, "zero") == 0.0
    with pytest.raises(ValueError, match="truncated"):
        reward.truncated_reward(rubrics, "half")


@pytest.mark.parametrize("finish", list(Finish))
def test_every_outcome_is_either_rewarded_or_masked(finish):
    answered = finish == Finish.ANSWERED
    trajectory = Trajectory(
        id="x", task_id="t0", policy="p", messages=[], finish=finish, answer="Vienna" if answered else None
    )
    scored = asyncio.run(reward.score(Judge(0.25), TASKS[0], RUBRICS["t0"], trajectory))
    if finish.is_policy_outcome:
        assert scored.masked is None and scored.reward == (0.25 if answered else 0.0)
    else:
        assert scored.masked == str(finish) and scored.reward is None


def test_an_error_of_the_tools_provider_ends_the_batch():
    def dead():
        raise RuntimeError("the host does not start")

    with pytest.raises(RuntimeError, match="does not start"):
        collect(dead)


def test_an_owned_dead_host_is_restarted_once_for_all_episodes():
    class Host:
        address, starts, up = "127.0.0.1:1", 0, False

        def alive(self):
            return self.up

        def restart(self):
            self.starts, self.up = self.starts + 1, True
            return self.address

    async def run():
        host = Host()
        tools = Tools(host.address, call_timeout=1.0, host=host)
        await asyncio.gather(*(tools.client() for _ in range(5)))
        await tools.close()
        return host.starts, tools.restarts

    assert asyncio.run(run()) == (1, 1)


def test_tasks_and_seeds_are_arithmetic():
    whole = [rollouts.choose_tasks(10, 4, seed=1, iteration=i) for i in range(5)]
    assert sorted(sum(whole, [])) == sorted(list(range(10)) * 2)  # two passes, each its own order
    assert whole[3] == rollouts.choose_tasks(10, 4, seed=1, iteration=3)
    assert whole != [rollouts.choose_tasks(10, 4, seed=2, iteration=i) for i in range(5)]
    seeds = {rollouts.episode_seed(1, i, j) for i in range(40) for j in range(64)}
    assert len(seeds) == 40 * 64 and max(seeds) < 2**31


def test_a_log_that_does_not_fit_is_named():
    episodes = collect(TableTools, tasks=TASKS[:1])
    with pytest.raises(ValueError, match="expected at most 16"):
        rollouts.rollout_arrays(episodes, 16)
