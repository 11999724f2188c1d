"""A small run directory with made-up content: random curves, template episodes. For tests of the report only."""

import json
import math
from pathlib import Path

import numpy as np

from stepdr_jax import files, records
from stepdr_jax.evaluation.results import Result
from stepdr_jax.records import (
    Answer,
    Finish,
    Judgment,
    Message,
    ObservedSource,
    Rubric,
    RubricSet,
    Task,
    ToolCall,
    Trajectory,
    Verdict,
)
from stepdr_jax.tokens import chat
from stepdr_jax.tokens.tokenizer import Tokenizer

SKILL = {"init": 0.0, "midtrain1": 0.03, "midtrain2": 0.2, "sft": 0.62, "ppo": 0.75}
HOSTILE = "</script><img src=x onerror=alert(1)> & <b>bold</b>"


def make_tasks(count: int = 24) -> list[Task]:
    kinds, tasks = ("fact", "fact", "deep_search", "verification", "report"), []
    for i in range(count):
        kind, lang = kinds[i % len(kinds)], "zh" if i % 4 == 3 else "en"
        query = f"Landia{i} 的首都是哪里？" if lang == "zh" else f"What is the capital of Landia{i}?"
        answer = None if kind == "report" else Answer(value=f"Town{i}")
        split = "heldout" if i % 2 else "train"
        tasks.append(Task(id=f"task{i:03d}", kind=kind, lang=lang, query=query, answer=answer, split=split))
    return tasks


def rubric_set(task: Task) -> RubricSet:
    return RubricSet(
        id=f"r_{task.id}",
        task_id=task.id,
        rubrics=[
            Rubric(rid="a", criterion="States the capital.", weight=3, role="explicit"),
            Rubric(rid="b", criterion="Cites an authoritative source.", weight=2, role="implicit"),
            Rubric(rid="c", criterion="Cites a passage that was never observed.", weight=-2, role="negative"),
        ],
    )


def make_episode(task: Task, good: bool, *, error: bool = False, policy: str = "test", hostile: bool = False):
    """A trajectory and its verdict; `error` puts a failed call and its recovery in front."""
    number = int(task.id[4:])
    source = ObservedSource(
        id="web_bakotefi",
        url=f"http://atlas.test/en/landia{number}",
        title=f"Landia{number}",
        text=f"The capital of Landia{number} is Town{number}. {HOSTILE if hostile else ''}",
        authority=2,
        published_at="2025-03-01",
    )
    messages = [
        Message(role="system", content="You are a research agent. Today is 2026-06-01."),
        Message(role="user", content=task.query),
    ]
    if error:
        call = chat.tool_call_text("batch_web_surfer", {"urls": ["http://flaky.test/x"]})
        messages += [
            Message(role="assistant", content=call),
            Message(role="tool", content="http://flaky.test/x: HTTP 503", error="tool_error", tool_call_id="0.0"),
        ]
    arguments = {"queries": [f"capital of Landia{number}"]}
    call = chat.tool_call_text("batch_web_surfer", arguments)
    answer = f"The capital of Landia{number} is {'Town' if good else 'Village'}{number}. \\cite{{web_bakotefi}}"
    if not good:
        answer += " \\cite{web_lostlost}"
    messages += [
        Message(
            role="assistant",
            content=f"<think>I search the capital of Landia{number}.</think>\n{call}",
            tool_calls=[ToolCall(id="1.0", name="batch_web_surfer", arguments=arguments)],
        ),
        Message(
            role="tool",
            content=f"1. Landia{number} | atlas.test | 2025-03-01\n{source.text} \\cite{{{source.id}}}",
            sources=[source],
            tool_call_id="1.0",
        ),
        Message(role="assistant", content=f"<answer>{answer}</answer>"),
    ]
    trajectory = Trajectory(
        id=f"{task.id}.{policy}",
        task_id=task.id,
        policy=policy,
        messages=messages,
        finish=Finish.ANSWERED,
        answer=answer,
        stats={
            "turns": 2.0 + error,
            "tool_calls": 1.0 + error,
            "tool_errors": float(error),
            "format_errors": 0.0,
            "recovered": float(error),
            "sampled_tokens": 60.0,
            "observed_tokens": 140.0,
            "wall_seconds": 0.5,
        },
    )
    scores = [1.0, 1.0, 0.0] if good else [0.0, 0.0, 1.0]
    verdict = Verdict(
        reward=1.0 if good else -0.4,
        judgments=[
            Judgment(rid=r, weight=w, role=role, verdict="satisfied" if s else "not_satisfied", score=s)
            for r, w, role, s in zip("abc", (3, 2, -2), ("explicit", "implicit", "negative"), scores, strict=True)
        ],
        correct=None if task.kind == "report" else good,
        cited=good,
    )
    return trajectory, verdict


def failed_episode(task: Task) -> tuple[Trajectory, Verdict]:
    trajectory, verdict = make_episode(task, True)
    trajectory.finish, trajectory.answer = Finish.INFRA_FAILED, None
    trajectory.metadata = {"cause": "tools: UNAVAILABLE"}
    verdict.reward = verdict.correct = verdict.cited = None
    return trajectory, verdict


def make_result(task: Task, index: int, stage: str, seed: int, good: bool, **kind) -> Result:
    trajectory, verdict = (
        failed_episode(task) if kind.pop("failed", False) else make_episode(task, good, policy=stage, **kind)
    )
    return Result(
        index=index,
        task_index=index,
        sample=0,
        stage=stage,
        seed=seed,
        sampling_seed=index * 1000,
        fingerprint="f",
        task_id=task.id,
        kind=task.kind,
        lang=task.lang,
        query=task.query,
        trajectory=trajectory,
        verdict=verdict,
        finish=str(trajectory.finish),
        reward=verdict.reward,
        correct=verdict.correct,
        cited=verdict.cited,
        turns=int(trajectory.stats["turns"]),
        tool_calls=int(trajectory.stats["tool_calls"]),
        errors=int(trajectory.stats["tool_errors"]),
        recovered=int(trajectory.stats["recovered"]),
        tokens=200.0,
        cost=2e-4,
        wall_seconds=0.5,
        missing=None if verdict.reward is not None else "infra_failed: tools: UNAVAILABLE",
    )


def write_corpus(run: Path, count: int = 24) -> list[Task]:
    tasks = make_tasks(count)
    records.write_records(run / "corpus" / "tasks.jsonl", tasks)
    records.write_records(run / "corpus" / "rubrics.jsonl", [rubric_set(task) for task in tasks])
    trajectories = []
    for i, task in enumerate(tasks):
        trajectory, _ = make_episode(task, i % 5 != 0, error=i % 3 == 0, policy="expert")
        trajectory.capability = ("deep_search", "reflection", "report")[i % 3]
        if i % 5 == 0:
            trajectory.kept, trajectory.drop_reason = False, ("incorrect", "unresolved citation")[i % 2]
        trajectories.append(trajectory)
        if trajectory.kept:
            copy = trajectory.model_copy(
                deep=True, update={"id": trajectory.id + ".1", "metadata": {"copy_of": trajectory.id}}
            )
            trajectories.append(copy)
    records.write_records(run / "corpus" / "trajectories.jsonl", trajectories)
    files.write_jsonl(
        run / "corpus" / "synthetic_documents.jsonl",
        [{"id": str(i), "component": ("quoting", "active_reading", "reasoning")[i % 3]} for i in range(90)],
    )
    files.write_jsonl(run / "corpus" / "documents.jsonl", [{"id": str(i)} for i in range(40)])
    texts = [message.content for t in trajectories for message in t.messages]
    Tokenizer.train(texts, 400).save(run / "tokenizer" / "tokenizer.json")
    return tasks


def write_prepared(run: Path) -> None:
    def component(rate: float, tokens: int) -> dict:
        counts = dict(sequences=tokens // 256, tokens=tokens, loss_tokens=tokens // 2, examples=tokens // 90)
        return counts | dict(dropped={"too_long": 3}, fill=0.93, shards=1, rate=rate, share_of_tokens=rate)

    stages = {
        stage: dict(
            seq_len=256, components={"quoting": component(0.6, 60_000), "active_reading": component(0.4, 40_000)}
        )
        for stage in ("midtrain1", "midtrain2", "sft")
    }
    files.write_json(run / "data" / "card.json", dict(stages=stages, tokens=300_000, tokenizer=dict(vocab_size=400)))


def write_training(run: Path, seed: int, steps: int = 200) -> None:
    noise = np.random.default_rng(seed)
    for stage, start, end in (("midtrain1", 6.0, 1.4), ("midtrain2", 2.0, 0.9), ("sft", 1.2, 0.5)):
        home = run / f"seed{seed}" / stage
        for step in range(10, steps + 1, 10):
            loss = end + (start - end) * math.exp(-step / 40) + 0.02 * noise.normal()
            files.append_jsonl(
                run / f"seed{seed}" / stage / "metrics.jsonl",
                dict(
                    step=step,
                    loss=loss,
                    source_loss=dict(quoting=loss - 0.2, active_reading=loss + 0.2),
                    capability_loss=dict(planning=loss - 0.1, report=loss + 0.1),
                    learning_rate=3e-3 * min(1, step / 20),
                    grad_norm=1.0 + 0.1 * noise.normal(),
                    skipped=0,
                    spikes=2 * (step == 100),
                    tokens_per_second=9000 + 100 * noise.normal(),
                    step_seconds=dict(median=0.1, p90=0.12, largest=0.3),
                    mfu=None if stage == "sft" else 0.4,
                    goodput=0.9,
                )
                | (dict(family_loss=dict(deep_search=loss, deep_research=loss + 0.3)) if stage == "sft" else {})
                | (dict(heldout_loss=dict(quoting=loss, active_reading=loss + 0.1)) if step % 50 == 0 else {}),
            )
        events = [dict(event="start", step=0), dict(event="start", step=50)]
        if stage == "midtrain1":
            events += [dict(event="rollback", step=120, to=100, reason="5 steps skipped"), dict(event="start", step=100)]
            for step in (100, 200):
                measured = dict(
                    reward=0.1 + step / 1000, correct=0.2, cited=0.3, format=dict(tool_calls=0.5, answer=0.6)
                )
                files.append_jsonl(home / "qa.jsonl", dict(step=step, tokens=step * 4096) | measured)
        for time, event in enumerate(events):
            files.append_jsonl(home / "events.jsonl", dict(time=float(time)) | event)
        files.write_json(
            run / f"seed{seed}" / stage / "done.json",
            dict(steps=steps, seconds=120.0, tokens=steps * 4096, params_sha256="0" * 64),
        )


def write_ppo(run: Path, seed: int, tasks: list[Task], iterations: int = 40) -> None:
    noise = np.random.default_rng(100 + seed)
    for i in range(iterations):
        grown = i / iterations
        files.append_jsonl(
            run / f"seed{seed}" / "ppo" / "metrics.jsonl",
            {
                "iteration": i,
                "reward": 0.4 + 0.3 * grown + 0.06 * noise.normal(),
                "success": 0.5 + 0.2 * grown + 0.05 * noise.normal(),
                "cited": 0.6 + 0.2 * grown + 0.05 * noise.normal(),
                "reward/fact": 0.5 + 0.2 * grown + 0.05 * noise.normal(),
                "reward/report": 0.3 + 0.3 * grown + 0.05 * noise.normal(),
                "finish/answered": 0.8 + 0.15 * grown,
                "finish/max_turns": 0.15 - 0.1 * grown,
                "finish/format": 0.05 - 0.05 * grown,
                "masked/infra_failed": float(i == 7) * 5,
                "masked/wall_clock": 0.0,
                "kl": 0.01 + 0.005 * abs(noise.normal()),
                "entropy": 0.5 - 0.2 * grown + 0.01 * noise.normal(),
                "explained_variance": 0.6 * grown + 0.05 * noise.normal(),
                "logprob_gap/mean": 1e-6 * abs(noise.normal()),
                "logprob_gap/max": 1e-5 * abs(noise.normal()),
                "turns": 2.5 - 0.3 * grown,
                "tool_calls": 1.5 - 0.3 * grown,
                "sampled_tokens": 70.0 - 10 * grown,
                "observed_tokens": 170.0 - 10 * grown,
                "tokens_by_finish/answered": 60.0 - 10 * grown,
                "tokens_by_finish/max_turns": 90.0,
                "seconds_sampling": 4.0 + 0.2 * noise.normal(),
                "seconds_training": 1.5 + 0.1 * noise.normal(),
                "value_loss": 0.1 - 0.05 * grown,
                "clip_fraction": 0.1 + 0.02 * noise.normal(),
            },
        )
    tokenizer = Tokenizer.load(run / "tokenizer" / "tokenizer.json")
    for i in (0, iterations // 2, iterations - 1):
        rows = []
        for n, task in enumerate(tasks[:8]):
            trajectory, verdict = (
                failed_episode(task) if n == 5 else make_episode(task, (n + i) % 3 > 0, error=n == 2, hostile=True)
            )
            log = chat.trajectory_tokens(tokenizer, trajectory).arrays()
            count = len(log["tokens"])
            ramp = np.linspace(0.2, 0.9, count)
            row = dict(
                iteration=i,
                index=n,
                task_id=task.id,
                reward=verdict.reward,
                masked="infra_failed" if verdict.reward is None else None,
                trajectory=trajectory.model_dump(mode="json", exclude_defaults=True),
                verdict=None if verdict.reward is None else verdict.model_dump(mode="json"),
            )
            if n % 2 == 0:  # the others come without token detail
                row |= dict(
                    tokens=log["tokens"].tolist(),
                    sampled=log["sampled"].tolist(),
                    logprobs=(-0.5 * noise.random(count)).tolist(),
                    values=ramp.tolist(),
                    advantages=((verdict.reward or 0) - ramp).tolist(),
                )
            rows.append(row)
        files.write_jsonl(run / f"seed{seed}" / "ppo" / "iterations" / f"{i:04d}.jsonl", rows)
    files.write_json(run / f"seed{seed}" / "ppo" / "done.json", dict(iterations=iterations, seconds=500.0))


def write_eval(run: Path, seed: int, tasks: list[Task], skill: dict[str, float] = SKILL) -> None:
    heldout = [task for task in tasks if task.split == "heldout"]
    for stage, share in skill.items():
        luck = np.random.default_rng(1000 * seed + 7).random(len(heldout))
        rows = [
            make_result(task, i, stage, seed, bool(luck[i] < share), error=i % 4 == 0, failed=stage == "sft" and i == 3)
            for i, task in enumerate(heldout)
        ]
        records.write_records(run / f"seed{seed}" / "eval" / f"{stage}.jsonl", rows)


def write_run(run: Path, seeds: int = 3, tasks: int = 24, skill: dict[str, float] = SKILL) -> None:
    """Writes everything a finished run has that the report reads."""
    made = write_corpus(run, tasks)
    write_prepared(run)
    ledger = {"offline_web": {"seconds": 8.0, "peak_bytes": 2e8}, "synthesize": {"seconds": 110.0, "peak_bytes": 9e8}}
    for seed in range(seeds):
        write_training(run, seed)
        write_ppo(run, seed, made)
        write_eval(run, seed, made, skill)
        ledger[f"seed{seed}.evaluate"] = {"seconds": 180.0, "peak_bytes": 7e8}
    (run / "stages.json").write_text(json.dumps(ledger))
