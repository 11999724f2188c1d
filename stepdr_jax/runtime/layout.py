"""Where a run keeps its files. Nothing else joins paths below a run directory.

    RUN/world  corpus  data  tokenizer  logs  research  .jax_cache     shared by all training seeds
    RUN/stages.json  report.html  report.json  judge_replies.sqlite
    RUN/seed<k>/<stage>/                                                `StageLayout`
    RUN/seed<k>/eval/<stage>.jsonl                                      evaluated episodes
    config.json in RUN, corpus, data, eval and each stage's folder   what it started with (`configuration.save_config`)

Checkpoints lie in the stage's folder, or in one of the same name below config.checkpointing.directory, which may be a
bucket. This module does not import jax.
"""

import dataclasses
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from ml_collections import ConfigDict

from stepdr_jax import files

if TYPE_CHECKING:
    from stepdr_jax.runtime.buckets import BucketPath


# Names in a run directory that a run writes.
ENTRIES = re.compile(
    r"(world|corpus|tokenizer|data|logs|research|weights|report.*|seed\d+|stages\.json|config.*\.json|"
    r"judge_replies\.sqlite.*|\..*|.*\.log)$"
)


def _storage():
    from stepdr_jax.runtime import storage  # here: tensorstore takes half a second, and most readers need none of it

    return storage


@dataclasses.dataclass(frozen=True)
class StageLayout:
    """The files of one stage of one seed.

    Attributes:
        directory: of everything but checkpoints.
        checkpoint_root: holds the checkpoints of all stages as seed<k>/<stage>, when that is not the run directory:
            config.checkpointing.directory, made absolute; "" = beside everything else.
    """

    directory: Path
    checkpoint_root: str = ""

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def settings(self) -> Path:
        """What decides the stage's numbers (`runtime.provenance`)."""
        return self.directory / "settings.json"

    @property
    def done(self) -> Path:
        """Written last."""
        return self.directory / "done.json"

    @property
    def metrics(self) -> Path:
        return self.directory / "metrics.jsonl"

    @property
    def events(self) -> Path:
        return self.directory / "events.jsonl"

    @property
    def location(self) -> Path:
        """Where the checkpoints lie: {"checkpointing.directory": `checkpoint_root`}."""
        return self.directory / "location.json"

    @property
    def rollbacks(self) -> Path:
        return self.directory / "rollbacks.json"

    @property
    def traces(self) -> Path:
        """Folder of profiler traces, one folder a trace."""
        return self.directory / "profiles"

    @property
    def trace_request(self) -> Path:
        """A file whose presence requests a trace."""
        return self.directory / "profile"

    @property
    def tensorboard(self) -> Path:
        return self.directory / "tensorboard"

    @property
    def hangs(self) -> Path:
        """Folder of the stack dumps of `runtime.watchdog`."""
        return self.directory / "hangs"

    @property
    def iterations(self) -> Path:
        """Folder of the recorded episodes of PPO, one file an iteration."""
        return self.directory / "iterations"

    @property
    def qa_rows(self) -> Path:
        """One row per evaluation checkpoint."""
        return self.directory / "qa.jsonl"

    @property
    def trajectories(self) -> Path:
        """The page of recorded episodes."""
        return self.directory / "trajectories.html"

    # ---------------------------------------------------------------- checkpoints: a folder, or a prefix of a bucket

    @property
    def stored(self) -> "Path | BucketPath":
        """Holds `checkpoint_dir` and the evaluation checkpoints. Raises UserError when the root is no usable place."""
        if not self.checkpoint_root:
            return self.directory
        return _storage().location(self.checkpoint_root) / self.directory.parent.name / self.name

    @property
    def checkpoint_dir(self) -> "Path | BucketPath":
        """Checkpoints to continue from, one folder a step."""
        return self.stored / "checkpoints"

    def eval_checkpoint(self, step: int) -> "Path | BucketPath":
        """Where a stage saves its parameters of `step` for evaluation: one checkpoint, never written again."""
        return self.stored / "eval_checkpoints" / f"{step:08d}"

    def eval_steps(self) -> list[int]:
        """Steps that have an evaluation checkpoint, in increasing order."""
        storage = _storage()
        found = storage.numbered_entries(self.stored / "eval_checkpoints")
        return [step for step in found if storage.saved_steps(self.eval_checkpoint(step))]

    def recorded_root(self) -> str | None:
        """`checkpoint_root` when the stage last began; None when it has not begun."""
        if self.location.exists():
            return files.read_json(self.location)["checkpointing.directory"]
        return "" if self.settings.exists() else None

    def recorded(self) -> "StageLayout":
        """The same stage with its checkpoints where it wrote them when it last began."""
        return dataclasses.replace(self, checkpoint_root=self.recorded_root() or "")

    def for_reading(self) -> "StageLayout":
        """Where a reader finds the checkpoints: here, or where the stage wrote them when there are none here."""
        return self if _storage().saved_steps(self.checkpoint_dir) else self.recorded()


@dataclasses.dataclass(frozen=True)
class RunLayout:
    """The files of one run.

    Attributes:
        root: the run directory.
        seed: training seed that methods take when they are given none.
        checkpoint_root: as in `StageLayout`.
    """

    root: Path
    seed: int = 0
    checkpoint_root: str = ""

    @classmethod
    def from_config(cls, config: ConfigDict) -> "RunLayout":
        """Raises UserError when config.checkpointing.directory is neither a folder nor a bucket."""
        section = config.get("checkpointing")
        directory = section.directory if section else ""
        return cls(
            Path(config.run_dir), config.get("seed", 0), str(_storage().location(directory)) if directory else ""
        )

    @classmethod
    def of_run_dir(cls, run_dir: str | os.PathLike, seed: int = 0) -> "RunLayout":
        """For readers that have no config: checkpoints are then where each stage recorded them."""
        return cls(Path(run_dir), seed)

    # ---------------------------------------------------------------- shared by all seeds

    @property
    def offline_web(self) -> Path:
        return self.root / "world"

    @property
    def entities(self) -> Path:
        """Names of everything that the offline web knows."""
        return self.offline_web / "entities.jsonl"

    @property
    def corpus(self) -> Path:
        return self.root / "corpus"

    @property
    def corpus_card(self) -> Path:
        return self.corpus / "card.json"

    @property
    def tasks(self) -> Path:
        return self.corpus / "tasks.jsonl"

    @property
    def rubrics(self) -> Path:
        return self.corpus / "rubrics.jsonl"

    @property
    def data(self) -> Path:
        """Folder of packed rows, one folder a stage, and the data card."""
        return self.root / "data"

    @property
    def data_card(self) -> Path:
        return self.data / "card.json"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer's JSON file."""
        return self.root / "tokenizer" / "tokenizer.json"

    @property
    def compilation_cache(self) -> Path:
        return self.root / ".jax_cache"

    @property
    def judge_replies(self) -> Path:
        return self.root / "judge_replies.sqlite"

    @property
    def published_weights(self) -> Path:
        """Folder of the weights that vLLM or SGLang servers load."""
        return self.root / "weights"

    @property
    def research(self) -> Path:
        """Folder of answered questions."""
        return self.root / "research"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    def tool_host_log(self, name: str) -> Path:
        """Log of the tool host that the job `name` starts, for example seed0.ppo."""
        return self.logs / f"{name}_tool_host.log"

    @property
    def ledger(self) -> Path:
        """Which stages have finished, with which settings, and what they took."""
        return self.root / "stages.json"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def report_json(self) -> Path:
        return self.root / "report.json"

    # ---------------------------------------------------------------- of one seed

    def seeds(self) -> list[int]:
        """Training seeds that have a folder, in increasing order."""
        found = (path.name.removeprefix("seed") for path in self.root.glob("seed*") if path.is_dir())
        return sorted(int(number) for number in found if number.isdigit())

    def seed_dir(self, seed: int | None = None) -> Path:
        return self.root / f"seed{self.seed if seed is None else seed}"

    def stage(self, name: str, seed: int | None = None) -> StageLayout:
        return StageLayout(self.seed_dir(seed) / name, self.checkpoint_root)

    def evaluated(self, name: str, seed: int | None = None) -> Path:
        """Rows of evaluated episodes of a stage, or of STAGE@STEP."""
        return self.seed_dir(seed) / "eval" / f"{name}.jsonl"
