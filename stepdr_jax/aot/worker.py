"""The process that compiles one program: python -m stepdr_jax.aot.worker REQUEST RESULT (both JSON files).

libtpu is loaded here and nowhere else, so that a crash, a hang or its memory stays out of the planner. Started by
`aot.compile`, which describes the two files and sets the environment that keeps libtpu quiet.
"""

import hashlib
import importlib.metadata
import json
import os
import pickle
import resource
import sys
import threading
import time
from pathlib import Path

import jax
from ml_collections import ConfigDict

from stepdr_jax.aot import collectives, memory, ppo, programs, schedule
from stepdr_jax.errors import UserError
from stepdr_jax.sharding import topology


def compile_program(request: dict) -> dict:
    """Compiles what `request` asks for; the fields of the result are those of aot.compile.Compiled.

    Raises:
        UserError: the config or its mesh cannot serve the topology.
    """
    config = ConfigDict(request["config"])
    slices = topology.parse(request["topology"])
    name, stage = request["program"], request["stage"]
    mesh, replica = programs.places(config, stage, slices)
    started = time.monotonic()
    program, arguments = programs.build_program(name, config, stage, mesh, replica)
    if stage == "ppo":
        mesh = jax.tree.leaves(arguments)[0].sharding.mesh
    lowered = program.lower(*arguments)
    lowered_at = time.monotonic()
    result = {
        "lower_seconds": lowered_at - started,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")},
        "hlo_sha256": hashlib.sha256(lowered.as_text().encode()).hexdigest(),
    }
    if stage == "ppo":
        result["argument_bytes"] = ppo.bytes_by_buffer(name, arguments)
        result["host_devices"] = ppo.host_devices(slices)
    dump = Path(request["dump"])
    if request["quick"]:
        threading.Thread(target=_leave_when_planned, args=(request, result, dict(mesh.shape)), daemon=True).start()
    try:
        compiled = lowered.compile(compiler_options={"xla_dump_to": str(dump), "xla_dump_hlo_as_text": True})
    except jax.errors.JaxRuntimeError as error:
        shortage = memory.shortage(str(error))
        if shortage is None:
            raise
        return result | {"status": "does not fit", "shortage": shortage} | _cost(lowered_at)
    result |= {"status": "fits", "memory": memory.by_kind(compiled.memory_analysis())} | _cost(lowered_at)
    result |= {"buffers": memory.top_buffers(dump)}
    result |= {"collectives": collectives.summarise(schedule.read_schedule(dump), dict(mesh.shape))}
    if request.get("save"):
        result["saved"] = _save(compiled, Path(request["save"]))
    return result


def _cost(since: float) -> dict:
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"compile_seconds": time.monotonic() - since, "rss_bytes": resident}


def _leave_when_planned(request: dict, result: dict, sizes: dict) -> None:
    """Writes the result and ends the process as soon as memory and schedule are dumped; code is never generated."""
    started, dump = time.monotonic(), Path(request["dump"])
    while not (planned := list(dump.glob("*jit_*after_optimizations_after_buffer_assignment.txt"))):
        time.sleep(0.1)
    size = -1
    while size != (size := planned[0].stat().st_size):
        time.sleep(0.2)
    held = memory.by_allocation(dump)
    limit = topology.parse(request["topology"]).generation.hbm
    if held["total"] > limit:
        result |= {"status": "does not fit", "shortage": {"needed": held["total"], "limit": limit}}
    else:
        result["status"] = "fits"
    found = collectives.summarise(schedule.parse(planned[0].read_text()), sizes)
    result |= {"memory": held, "buffers": memory.top_buffers(dump), "collectives": found} | _cost(started)
    _write(Path(request["answer"]), result)
    os._exit(0)


def _write(path: Path, result: dict) -> None:
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(result))
    partial.replace(path)


def _save(compiled, path: Path) -> str:
    """Pickles what jax.experimental.serialize_executable.deserialize_and_load takes; that needs the TPU itself."""
    from jax.experimental import serialize_executable

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(serialize_executable.serialize(compiled)))
    return str(path)


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text()) | {"answer": sys.argv[2]}
    try:
        result = compile_program(request)
    except UserError as error:
        result = {"status": "error", "error": str(error)}
    _write(Path(sys.argv[2]), result)


if __name__ == "__main__":
    main()
