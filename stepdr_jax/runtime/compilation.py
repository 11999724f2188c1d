"""Compiled programs kept on disk, so that a process that resumes a run does not compile again."""

import hashlib
import os
import platform
import warnings
from pathlib import Path

import jax
import jaxlib


def keep_compiled(directory: str | os.PathLike) -> None:
    """Turns on jax's persistent compilation cache under `directory`, one subdirectory per kind of machine.

    A program taken from the cache is the one that was compiled, so results are the same to the bit. Programs for CPUs
    use what instructions their machine has: another machine that shares the directory must not load them. A damaged
    entry is compiled again. A cache that was already chosen (JAX_COMPILATION_CACHE_DIR) is left as it is.
    """
    if jax.config.jax_compilation_cache_dir:
        return
    kind = hashlib.sha256(f"{jax.__version__} {jaxlib.__version__} {_processor()}".encode()).hexdigest()[:12]
    jax.config.update("jax_compilation_cache_dir", str(Path(directory).absolute() / kind))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    # A process killed while writing leaves an entry that fails its checksum; it costs a compilation, not a decision.
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache")


def _processor() -> str:
    """What tells apart machines whose instructions differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return " ".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
