"""A small world for the loop: two short turns with an observation between them, and a judge that likes one letter."""

import asyncio
import random

import jax
from ml_collections import ConfigDict

from configs import miniature
from stepdr_jax.agent.react import Episode
from stepdr_jax.endpoint import EndpointError
from stepdr_jax.engine.engine import EngineError
from stepdr_jax.models import qwen2
from stepdr_jax.records import Finish, Judgment, Message, RubricSet, Task, Trajectory, Verdict
from stepdr_jax.rl import loop
from stepdr_jax.tokens.tokenizer import Tokenizer
from tools_env.client import ToolInfraError

TOKENIZER = Tokenizer.train(["a b c d e f g h i j k l m n o p"], 300)
LIKED = "e"
NO_GUARD = dict(max_kl=0.0, min_entropy=0.0, max_repetition=0.0)  # to repeat one letter is what the judge likes


def config(run_dir, **ppo) -> ConfigDict:
    config = miniature.get_config().unlock()
    config.run_dir = str(run_dir)
    config.model.update(
        dict(hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, intermediate_size=48)
    )
    config.agent.update(dict(max_turns=2, max_turn_tokens=6, max_episode_tokens=48, wall_seconds=60.0))
    config.ppo.update(
        dict(
            iterations=4,
            prompts_per_iteration=4,
            samples_per_prompt=2,
            warmup_steps=1,
            critic_warmup_iterations=1,
            critic_minibatches=2,
            checkpoint_every=2,
            microbatch_sequences=4,
            guard=NO_GUARD,
        )
        | ppo
    )
    config.sampler.update(dict(max_num_seqs=config.ppo.prompts_per_iteration * config.ppo.samples_per_prompt, pools=4))
    return config.lock()


class ToyTools:
    """Tools that a session's seed delays and, when told so, breaks; `restarts` as rollouts.Tools has it."""

    restarts = 0

    def __init__(self, broken=lambda seed, attempt: False):
        self.broken, self.attempts = broken, {}

    async def client(self):
        return self

    async def wait_ready(self, timeout):
        pass

    async def look(self, seed: int) -> str:
        self.attempts[seed] = attempt = self.attempts.get(seed, 0) + 1
        for _ in range(random.randrange(5)):  # other orders of arrival in every run
            await asyncio.sleep(0)
        if self.broken(seed, attempt):
            raise ToolInfraError("UNAVAILABLE: the toy host is down")
        return "abc"

    async def close(self):
        pass


async def run_episode(task, policy, tools, limits, *, prompt, as_of, seed):
    session = policy.start([Message(role="user", content=task.query)], episode_id=f"{task.id}.{seed}", seed=seed)
    turns, finish, metadata = [], Finish.ANSWERED, {}
    try:
        turns.append(await session.act(limits.max_turn_tokens))
        await session.observe([await tools.look(seed)])
        turns.append(await session.act(limits.max_turn_tokens))
    except (ToolInfraError, EngineError, EndpointError) as error:
        finish, metadata = Finish.INFRA_FAILED, {"cause": f"{type(error).__name__}: {error}"}
    await session.close()
    trajectory = Trajectory(
        id=f"{task.id}.{seed}",
        task_id=task.id,
        policy="toy",
        messages=[Message(role="assistant", content=turn.text) for turn in turns],
        finish=finish,
        answer="".join(turn.text for turn in turns) if finish == Finish.ANSWERED else None,
        stats={"turns": float(len(turns)), "sampled_tokens": float(session.log.sampled_count)},
        metadata=metadata,
    )
    return Episode(trajectory, session.log)


class LetterJudge:
    """Reward: how many of the liked letter, out of ten, at most 1. A fraction, so integer rewards would show."""

    async def judge(self, task, rubric_set, trajectory):
        share = min(trajectory.answer.count(LIKED) / 10, 1.0)
        judgment = Judgment(rid="a", weight=1, role="explicit", verdict="satisfied", score=1.0)
        return Verdict(reward=share, judgments=[judgment], correct=share > 0.5)

    async def close(self):
        pass


def inputs(config, *, tools=None, run_episode=run_episode, judge=None, tasks=8) -> loop.PPOInputs:
    model = qwen2.Qwen2Config.from_config(config.model, TOKENIZER.vocab_size)
    return loop.PPOInputs(
        tokenizer=TOKENIZER,
        model=model,
        read_actor=lambda: qwen2.init_params(model, jax.random.key(config.seed)),
        tasks=[Task(id=f"t{i}", kind="fact", lang="en", query="abcdefgh"[: i + 1]) for i in range(tasks)],
        rubric_sets={f"t{i}": RubricSet(id=f"r{i}", task_id=f"t{i}", rubrics=[]) for i in range(tasks)},
        judge=judge or LetterJudge(),
        connect_tools=lambda: tools or ToyTools(),
        origin="toy",
        run_episode=run_episode,
    )
