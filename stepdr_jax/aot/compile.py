"""Compiles a program for a TPU slice in a process of its own, within a time limit, and says meanwhile that it does.

XLA plans memory and the schedule in seconds and then generates code for longer. `quick` stops it in between: memory
and schedule are the compiler's own, only the code is missing.
"""

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ml_collections import ConfigDict

from stepdr_jax.errors import UserError
from stepdr_jax.progress import clock

PACKAGE = Path(__file__).resolve().parents[1]
# Keeps libtpu from asking a metadata server, writing logs and refusing a second process.
ENVIRONMENT = dict(
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    JAX_PLATFORMS="cpu",
    TF_CPP_MIN_LOG_LEVEL="3",
    TPU_ACCELERATOR_TYPE="v5p-8",
    TPU_LOG_DIR="disabled",
    TPU_MIN_LOG_LEVEL="3",
    TPU_SKIP_MDS_QUERY="1",
    TPU_STDERR_LOG_LEVEL="3",
    TPU_WORKER_HOSTNAMES="localhost",
)
_SECTIONS = ("model", "mesh", "parallel", "tokenizer")
_PPO = (("agent", "sampler", "placement"), ("engine", "rl"))  # sections and sources that PPO's programs depend on, too


@dataclasses.dataclass(frozen=True)
class Request:
    """What to compile: a program of aot.programs, of one stage of a config, for a topology as `topology.parse` reads
    it.

    save: file for the serialized executable; "" for none. quick: stop before code is generated.
    """

    config: ConfigDict
    stage: str
    program: str
    topology: str
    save: str = ""
    quick: bool = False

    def key(self) -> str:
        """Hash of all that the result depends on: fields, source files and versions."""
        import importlib.metadata

        digest = hashlib.sha256()
        sections, folders = _PPO if self.stage == "ppo" else ((), ())
        fields = {name: self.config[name].to_dict() for name in (*_SECTIONS, *sections, self.stage)}
        versions = [importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")]
        digest.update(json.dumps([fields, self.stage, self.program, self.topology, self.quick, versions]).encode())
        for folder in ("aot", "models", "ops", "sharding", "training", *folders):
            for path in sorted((PACKAGE / folder).glob("*.py")):
                digest.update(path.read_bytes())
        return digest.hexdigest()[:24]


def compile_program(request: Request, *, limit: float = 900.0, cache: Path | None = None, label: str = "") -> dict:
    """The result of a compilation, from `cache` if it is there.

    Args:
        request: what to compile.
        limit: seconds after which it is stopped.
        cache: folder of results, one JSON file each; None for none.
        label: how progress names it.

    Returns:
        status ("fits" or "does not fit"), memory (bytes by kind, with quick only total), shortage (needed and limit),
        buffers, collectives, lower_seconds, compile_seconds, rss_bytes, hlo_sha256, versions, saved; of PPO's programs
        buffers (bytes of each argument on a device).

    Raises:
        UserError: libtpu is missing, the config does not suit the topology, or the limit was reached.
    """
    import importlib.util

    if importlib.util.find_spec("libtpu") is None:
        raise UserError("libtpu is not installed; install it with: pip install -e .[tpu] (no TPU is needed)")
    kept = cache / f"{request.key()}.json" if cache and not request.save else None
    if kept and kept.exists():
        return json.loads(kept.read_text())
    with tempfile.TemporaryDirectory(prefix="stepdr_plan_") as folder:
        result = _run(request, Path(folder), limit, label or request.program)
    if result["status"] == "error":
        raise UserError(result["error"])
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(f".{os.getpid()}.tmp")
        partial.write_text(json.dumps(result))
        partial.replace(kept)
    return result


def _run(request: Request, folder: Path, limit: float, label: str) -> dict:
    asked, answer, dump = folder / "request.json", folder / "result.json", folder / "dump"
    fields = dict(
        config=request.config.to_dict(),
        stage=request.stage,
        program=request.program,
        topology=request.topology,
        save=request.save,
        dump=str(dump),
        quick=request.quick,
    )
    asked.write_text(json.dumps(fields))
    paths = os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": paths}
    errors = folder / "stderr"
    started = time.monotonic()
    with errors.open("wb") as stderr:
        command = [sys.executable, "-m", "stepdr_jax.aot.worker", str(asked), str(answer)]
        child = subprocess.Popen(command, env=environment, stdout=stderr, stderr=stderr, start_new_session=True)
        try:
            while True:
                try:
                    child.wait(timeout=0.5)
                    break
                except subprocess.TimeoutExpired:
                    gone = time.monotonic() - started
                    _say(f"compiling {label} for {request.topology}  {clock(gone)} gone, usually under 2m")
                    if gone > limit:
                        raise UserError(
                            f"compiling {label} took more than {limit:.0f} s and was stopped; give it more with "
                            "--timeout=SECONDS, or wait until the machine is less busy"
                        ) from None
        finally:
            _end(child)
            _say("")
    if not answer.exists():
        tail = errors.read_text(errors="replace").strip().splitlines()[-1:] or ["no message"]
        raise RuntimeError(
            f"the compiling process ended with status {child.returncode}: {tail[0]}\n" + errors.read_text()[-4000:]
        )
    return json.loads(answer.read_text())


def _end(child: subprocess.Popen) -> None:
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _say(line: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write("\r\x1b[K" + line)
        sys.stderr.flush()
