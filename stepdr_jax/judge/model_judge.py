"""Rubrics judged by a language model: a model at an endpoint, or one of ours in the JAX sampler.

The rubrics of a report are sent in requests of `per_request`. Rubrics without a readable verdict are asked for again,
alone and with another seed; what stays unreadable is a failed judgment without a score (`verdicts.aggregate_reward`
leaves it out, or masks the episode).
"""

import asyncio
import hashlib
import itertools
import json
import sqlite3
from collections.abc import Iterable, Sequence
from pathlib import Path

from stepdr_jax.judge import judges, prompts, verdicts
from stepdr_jax.records import Judgment, Message, Rubric, RubricSet, Task, Trajectory, Verdict


class ModelJudge:
    """A `judges.Judge` over a policy.

    Args:
        policy: an `agent.policy.Policy`; its temperature should be 0. Its name is part of the cache key of replies.
        names: known entity names, for `correct`; see `ProgrammaticJudge`.
        checks: decide rubrics that carry a machine-readable check without the model.
        mapping, max_missing: see `ProgrammaticJudge`.
        per_request: rubrics of one request.
        attempts: requests at most for a rubric's verdict.
        max_tokens: of one reply.
        replies: file that caches readable replies, so that equal requests are sent once; None caches none.
    """

    def __init__(
        self,
        policy,
        *,
        names: Iterable[str] = (),
        checks: bool = False,
        mapping: verdicts.ScoreMapping = "strict",
        max_missing: float = 0.1,
        per_request: int = 8,
        attempts: int = 3,
        max_tokens: int = 4096,
        replies: str | Path | None = None,
    ):
        self.policy, self.checks, self.per_request = policy, checks, per_request
        self.attempts, self.max_tokens = attempts, max_tokens
        self._programmatic = judges.ProgrammaticJudge(names, mapping=mapping, max_missing=max_missing)
        self._replies = ReplyCache(replies) if replies else None
        self._names = itertools.count()  # of sessions: equal requests may run at once

    async def judge(self, task: Task, rubric_set: RubricSet, trajectory: Trajectory) -> Verdict:
        """See `judges.Judge`; a model that fails or replies nonsense makes failed judgments, never an exception."""
        if not trajectory.finish.is_policy_outcome:
            return judges.infrastructure_verdict(rubric_set, trajectory)
        view = self._programmatic.view(trajectory)
        by_check = [r for r in rubric_set.rubrics if self.checks and r.check.get("kind") in judges.CHECKS]
        found = {rubric.rid: self._programmatic.decide(rubric, view) for rubric in by_check}
        asked = [rubric for rubric in rubric_set.rubrics if rubric.rid not in found]
        parts = [asked[i : i + self.per_request] for i in range(0, len(asked), self.per_request)]
        for judged in await asyncio.gather(*(self._ask(task, part, view) for part in parts)):
            found |= judged
        return self._programmatic.verdict(task, rubric_set, view, [found[r.rid] for r in rubric_set.rubrics])

    async def close(self) -> None:
        """Closes the connections of a policy that has some."""
        if close := getattr(self.policy, "close", None):
            await close()

    async def _ask(self, task: Task, rubrics: Sequence[Rubric], view: judges.AnswerView) -> dict[str, Judgment]:
        found: dict[str, Judgment] = {}
        reason = ""
        for seed in range(self.attempts):
            left = [rubric for rubric in rubrics if rubric.rid not in found]
            if not left:
                break
            messages = prompts.judge_messages(task, left, view.answer, view.cited)
            try:
                text = await self._reply(messages, seed, left)
            except Exception as error:  # an endpoint or engine failed: not the report's fault
                reason = f"{type(error).__name__}: {error}"
                continue
            read = prompts.read_verdicts(text, left)
            reason = f"the reply gave no verdict: {text[:200]!r}"
            for rubric in left:
                if rubric.rid in read:
                    found[rubric.rid] = self._programmatic.judged(rubric, *read[rubric.rid])
        return found | {r.rid: judges.failed_judgment(r, reason) for r in rubrics if r.rid not in found}

    async def _reply(self, messages: list[Message], seed: int, rubrics: Sequence[Rubric]) -> str:
        request = json.dumps([prompts.VERSION, self.policy.name, seed, [(m.role, m.content) for m in messages]])
        key = hashlib.sha256(request.encode()).hexdigest()
        if self._replies and (kept := self._replies.get(key)) is not None:
            return kept
        session = self.policy.start(messages, episode_id=f"judge {next(self._names)}", seed=seed)
        try:
            turn = await session.act(self.max_tokens)
        finally:
            await session.close()
        if turn.finish != "stop":  # a quotation in a truncated reply could pass for its verdict
            raise ValueError(f"the reply was cut after judge.max_tokens = {self.max_tokens}; raise it")
        text = turn.text
        if self._replies and len(prompts.read_verdicts(text, rubrics)) == len(rubrics):
            self._replies.put(key, text)
        return text


class ReplyCache:
    """ReplyCache by the hash of their request, in one SQLite file that several processes may share."""

    def __init__(self, path: str | Path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._connection = sqlite3.connect(path, timeout=30.0, isolation_level=None)
        self._connection.execute("pragma journal_mode=wal")
        self._connection.execute("create table if not exists replies (key text primary key, text text not null)")

    def get(self, key: str) -> str | None:
        row = self._connection.execute("select text from replies where key = ?", (key,)).fetchone()
        return row[0] if row else None

    def put(self, key: str, text: str) -> None:
        self._connection.execute("insert or ignore into replies values (?, ?)", (key, text))
