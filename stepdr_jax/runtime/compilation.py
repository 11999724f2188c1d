"""A compilation cache on disk, so that a process that resumes a run does not compile again."""

import hashlib
import os
import platform
import warnings
from pathlib import Path

import jax
import jaxlib


def enable_compilation_cache(directory: str | os.PathLike) -> None:
    """Turns on jax's persistent compilation cache under `directory`, one subdirectory per kind of machine.

    A cached program is the program that was compiled, so results are the same to the bit. Programs for CPUs use all
    instructions of their machine, so another kind of machine must not load them. A damaged entry is compiled again. A
    cache chosen with JAX_COMPILATION_CACHE_DIR takes precedence.
    """
    if jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]  # jax defines its flags at run time
        return
    kind = hashlib.sha256(f"{jax.__version__} {jaxlib.__version__} {_processor()}".encode()).hexdigest()[:12]
    jax.config.update("jax_compilation_cache_dir", str(Path(directory).absolute() / kind))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    # A process killed while writing leaves an entry that fails its checksum and is compiled again.
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache")


def _processor() -> str:
    """Differs between machines with different instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return " ".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
