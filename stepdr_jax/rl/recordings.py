"""Episodes on disk: written before anything is learned from them, read again to continue or to learn anew.

    iterations/<number>.jsonl   one row an episode: trajectory, reward, verdict; after learning a few have every token's numbers
    iterations/<number>.npz     the token logs of all, one after the other, and what the recording was made with

The second file is written last; where it stands, both are whole.
"""

import io
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from stepdr_jax import files
from stepdr_jax.errors import UserError
from stepdr_jax.records import Task, Trajectory, Verdict
from stepdr_jax.rl.reward import Scored
from stepdr_jax.rl.rollouts import Episode
from stepdr_jax.tokens.log import TokenLog

DETAILED_EPISODES = 4  # of an iteration, written with every token's value, advantage and log-probability
_LOG = ("tokens", "sampled", "logprobs", "version")


def paths(directory: Path, iteration: int) -> tuple[Path, Path]:
    return directory / f"{iteration:04d}.jsonl", directory / f"{iteration:04d}.npz"


def save(directory: Path, iteration: int, episodes: Sequence[Episode], mark: str) -> None:
    """Writes an iteration's episodes; `mark` names the settings that they are a function of."""
    rows, logs = paths(directory, iteration)
    logs.unlink(missing_ok=True)
    files.write_jsonl(rows, (_row(iteration, episode) for episode in episodes))
    held = [(episode.log or TokenLog()).arrays() for episode in episodes]
    joined = {name: np.concatenate([log[name] for log in held]) for name in _LOG}
    buffer = io.BytesIO()
    lengths = [-1 if episode.log is None else len(episode.log) for episode in episodes]
    np.savez_compressed(buffer, **joined, lengths=np.asarray(lengths, np.int64), mark=np.asarray(mark))
    files.write_atomic(logs, buffer.getvalue())


def load(directory: Path, iteration: int, tasks: Mapping[str, Task], mark: str | None = None) -> list[Episode] | None:
    """Reads an iteration's episodes, as they were saved; None when there are none, or with another `mark`.

    Args:
        directory: of a run's iterations.
        tasks: by id.
        mark: what `save` was told; None takes any.

    Raises UserError when a task is not known, or a file is damaged.
    """
    rows, logs = paths(directory, iteration)
    if not logs.exists():
        return None
    made_with, held = read(directory, iteration)
    if mark is not None and made_with != mark:
        return None
    try:
        return [_episode(row, log, tasks) for row, log in held]
    except KeyError as error:
        raise UserError(f"{rows}: task or field {error} is not known here; delete the recording {logs}") from None
    except ValueError as error:
        raise UserError(f"the recording {logs} is damaged ({str(error)[:160]}); delete it") from None


def read(directory: Path, iteration: int) -> tuple[str, list[tuple[dict, dict[str, np.ndarray] | None]]]:
    """Reads an iteration's files as they are: the mark, and every episode's row with its token log.

    The arrays of a log are those of `TokenLog.arrays`; None where an episode has no log. Raises UserError when a file is
    damaged or absent.
    """
    rows, logs = paths(directory, iteration)
    try:
        with np.load(logs, allow_pickle=False) as held:
            mark, arrays = str(held["mark"]), {name: held[name] for name in (*_LOG, "lengths")}
        found, lengths = files.read_jsonl(rows), arrays["lengths"]
        if len(found) != len(lengths):
            raise ValueError(f"{len(found)} episodes, {len(lengths)} token logs")
        ends = np.cumsum(np.maximum(lengths, 0))
        cut = [
            None if length < 0 else {name: arrays[name][end - length : end] for name in _LOG}
            for length, end in zip(lengths, ends, strict=True)
        ]
        return mark, list(zip(found, cut, strict=True))
    except (KeyError, ValueError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"the recording {logs} is damaged ({str(error)[:160]}); delete it") from None


def _episode(row: dict, log: dict | None, tasks: Mapping[str, Task]) -> Episode:
    verdict = None if row["verdict"] is None else Verdict.model_validate(row["verdict"])
    return Episode(
        row["index"],
        tasks[row["task_id"]],
        row["seed"],
        Trajectory.model_validate(row["trajectory"]),
        None if log is None else TokenLog.of_arrays(**log),
        Scored(row["reward"], verdict, row["masked"]),
    )


def add_details(directory: Path, iteration: int, episodes: Sequence[Episode], batch, details) -> None:
    """Writes the rows again, a few, evenly spaced, with what the learner saw at every token.

    Args:
        batch: `rollouts.arrays` of the episodes.
        details: `learner.Details`.
    """
    kept = [episode.index for episode in episodes if episode.masked is None]
    places = np.linspace(0, len(kept) - 1, min(DETAILED_EPISODES, len(kept))).round().astype(int)
    detailed = {kept[place] for place in places}

    def rows():
        for episode in episodes:
            row = _row(iteration, episode)
            if episode.index in detailed:
                length = int(batch.lengths_E[episode.index])
                log = episode.log.arrays()
                row |= {
                    "tokens": log["tokens"][:length].tolist(),
                    "sampled": log["sampled"][:length].tolist(),
                    "version": log["version"][:length].tolist(),
                    "sampler_logprobs": _short(log["logprobs"][:length]),
                    "logprobs": _short(details.logprobs_ET[episode.index, :length]),
                    "values": _short(details.values_ET[episode.index, :length]),
                    "advantages": _short(details.advantages_ET[episode.index, :length]),
                }
            yield row

    files.write_jsonl(paths(directory, iteration)[0], rows())


def _row(iteration: int, episode: Episode) -> dict:
    return {
        "iteration": iteration,
        "index": episode.index,
        "task_id": episode.task.id,
        "seed": episode.seed,
        "reward": episode.scored.reward,
        "masked": episode.masked,
        "finish": str(episode.trajectory.finish),
        "trajectory": episode.trajectory.model_dump(mode="json", exclude_defaults=True),
        "verdict": None if episode.scored.verdict is None else episode.scored.verdict.model_dump(mode="json"),
    }


def _short(values_T: np.ndarray) -> list[float]:
    """Seven decimals: float32 log-probabilities of sampler and trainer differ in the sixth."""
    return [round(float(value), 7) for value in values_T]
