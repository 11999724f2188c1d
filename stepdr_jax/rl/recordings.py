"""Rollouts on disk: written before any update uses them, read again by a resumed run or a replay.

    iterations/<number>.jsonl   one row an episode: trajectory, reward, verdict; of a few, per-token values
    iterations/<number>.npz     all token logs, concatenated, and the fingerprint of the settings

The second file is written last: when it exists, both are complete.
"""

import io
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from stepdr_jax import files
from stepdr_jax.errors import UserError
from stepdr_jax.judge.scored import Scored
from stepdr_jax.records import Task, Trajectory, Verdict
from stepdr_jax.rl.learner import Details
from stepdr_jax.rl.rollout_metrics import evenly_spaced
from stepdr_jax.rl.rollouts import EpisodeArrays, Rollout
from stepdr_jax.tokens.log import TokenLog

DETAILED_EPISODES = 4  # of an iteration, written with the value, advantage and log-probability of every token
_LOG = ("tokens", "sampled", "logprobs", "version")


def recording_paths(directory: Path, iteration: int) -> tuple[Path, Path]:
    return directory / f"{iteration:04d}.jsonl", directory / f"{iteration:04d}.npz"


def save_rollouts(directory: Path, iteration: int, episodes: Sequence[Rollout], fingerprint: str) -> None:
    """Writes an iteration's rollouts; `fingerprint` identifies the settings that they are a function of."""
    rows, logs = recording_paths(directory, iteration)
    logs.unlink(missing_ok=True)
    files.write_jsonl(rows, (_row(iteration, episode) for episode in episodes))
    held = [(episode.log or TokenLog()).arrays() for episode in episodes]
    lengths = [-1 if episode.log is None else len(episode.log) for episode in episodes]
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        allow_pickle=False,
        lengths=np.asarray(lengths, np.int64),
        fingerprint=np.asarray(fingerprint),
        **{name: np.concatenate([log[name] for log in held]) for name in _LOG},
    )
    files.write_atomic(logs, buffer.getvalue())


def load_rollouts(
    directory: Path, iteration: int, tasks: Mapping[str, Task], fingerprint: str | None = None
) -> list[Rollout] | None:
    """Reads an iteration's rollouts; None when there are none, or only some of another `fingerprint`.

    Args:
        directory: of a run's iterations.
        tasks: by id.
        fingerprint: as given to `save_rollouts`; None accepts any.

    Raises UserError when a task is not known, or a file is damaged.
    """
    rows, logs = recording_paths(directory, iteration)
    if not logs.exists():
        return None
    found, held = read_recording(directory, iteration)
    if fingerprint is not None and found != fingerprint:
        return None
    try:
        return [_rollout(row, log, tasks) for row, log in held]
    except KeyError as error:
        raise UserError(f"{rows}: task or field {error} is not known here; delete the recording {logs}") from None
    except ValueError as error:
        raise UserError(f"the recording {logs} is damaged ({str(error)[:160]}); delete it") from None


def read_recording(directory: Path, iteration: int) -> tuple[str, list[tuple[dict, dict[str, np.ndarray] | None]]]:
    """Reads an iteration's files as plain data: the fingerprint, and every episode's row with its token log.

    The arrays of a log are those of `TokenLog.arrays`; None where an episode has no log. Raises UserError when a file
    is damaged or absent.
    """
    rows, logs = recording_paths(directory, iteration)
    try:
        with np.load(logs, allow_pickle=False) as held:
            fingerprint, arrays = str(held["fingerprint"]), {name: held[name] for name in (*_LOG, "lengths")}
        found, lengths = files.read_jsonl(rows), arrays["lengths"]
        if len(found) != len(lengths):
            raise ValueError(f"{len(found)} episodes, {len(lengths)} token logs")
        ends = np.cumsum(np.maximum(lengths, 0))
        split = [
            None if length < 0 else {name: arrays[name][end - length : end] for name in _LOG}
            for length, end in zip(lengths, ends, strict=True)
        ]
        return fingerprint, list(zip(found, split, strict=True))
    except (KeyError, ValueError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"the recording {logs} is damaged ({str(error)[:160]}); delete it") from None


def _rollout(row: dict, log: dict | None, tasks: Mapping[str, Task]) -> Rollout:
    verdict = None if row["verdict"] is None else Verdict.model_validate(row["verdict"])
    return Rollout(
        row["index"],
        tasks[row["task_id"]],
        row["seed"],
        Trajectory.model_validate(row["trajectory"]),
        None if log is None else TokenLog.of_arrays(**log),
        Scored(row["reward"], verdict, row["masked"]),
    )


def add_details(
    directory: Path, iteration: int, episodes: Sequence[Rollout], batch: EpisodeArrays, details: Details
) -> None:
    """Rewrites the rows; a few, evenly spaced, get the learner's values of every token. `batch` is of `episodes`."""
    kept = [episode.index for episode in episodes if episode.masked is None]
    detailed = {kept[place] for place in evenly_spaced(len(kept), DETAILED_EPISODES)}

    def rows() -> Iterator[dict]:
        for episode in episodes:
            row = _row(iteration, episode)
            if episode.index in detailed and episode.log is not None:
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

    files.write_jsonl(recording_paths(directory, iteration)[0], rows())


def _row(iteration: int, episode: Rollout) -> dict:
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
