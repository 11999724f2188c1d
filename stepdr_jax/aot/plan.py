"""The plan of a config on a TPU slice: compiled programs, whether they fit, what to change, and an estimated speed."""

import copy
import dataclasses
from pathlib import Path

from ml_collections import ConfigDict

from stepdr_jax.aot import collectives, compile, memory, roofline
from stepdr_jax.errors import UserError
from stepdr_jax.models.qwen2 import Qwen2Config
from stepdr_jax.sharding import topology
from stepdr_jax.sharding.mesh import AXES

SCHEMA = 1
REMAT_LADDER = ("none", "attention", "layer", "offload")  # from most to least memory


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to compile. quick: stop before code is generated, with the same memory and schedule; limit: seconds for each;
    cache: folder of results; save: folder for executables."""

    quick: bool = True
    limit: float = 900.0
    cache: Path | None = None
    save: Path | None = None


def model_of(config: ConfigDict) -> Qwen2Config:
    """The model with the vocabulary of the tokenizer."""
    return Qwen2Config.from_config(config.model, config.tokenizer.vocab_size)


def changed(config: ConfigDict, stage: str, *, mesh: dict | None = None, parallel: dict | None = None, **fields):
    """A copy of `config` with another mesh, other parallel fields, and other fields of the stage."""
    other = copy.deepcopy(config).unlock()
    other.mesh.update(mesh or {})
    other.parallel.update(parallel or {})
    other[stage].update(fields)
    return other.lock()


def plan(
    config: ConfigDict,
    stage: str,
    slices: topology.Topology,
    programs: list[str],
    settings: Settings,
    *,
    advice: bool = True,
) -> dict:
    """Compiles `programs` of a stage and returns the plan, plain data; docs/plans.md explains its fields.

    Raises:
        UserError: the mesh is not that of the slice, a size does not divide, libtpu is missing, time ran out.
    """
    topology.check_mesh(slices, config.mesh)
    held = {name: _program(config, stage, slices, name, settings, advice) for name in programs}
    section = config[stage]
    return {
        "schema": SCHEMA,
        "config": config.name,
        "stage": stage,
        "topology": str(slices),
        "chips": slices.chips,
        "devices": slices.devices,
        "limit_bytes": slices.generation.hbm,
        "mesh": {axis: config.mesh[axis] for axis in AXES},
        "seq_len": section.seq_len,
        "batch_size": section.batch_size,
        "microbatches": section.microbatches,
        "parallel": config.parallel.to_dict(),
        "fits": all(program["status"] == "fits" for program in held.values()),
        "programs": held,
    }


def _program(config, stage, slices, name, settings: Settings, advice: bool) -> dict:
    save = str(settings.save / f"{config.name}-{stage}-{name}-{slices}.pickle") if settings.save else ""
    request = compile.Request(config, stage, name, str(slices), save=save, quick=settings.quick and not save)
    result = compile.compile_program(
        request, limit=settings.limit, cache=settings.cache, label=f"{name} step of {stage}"
    )
    if result["status"] == "fits":
        model, section, mesh = model_of(config), config[stage], config.mesh
        tokens = section.seq_len * section.batch_size
        backward = name == "train"
        strategy = _strategy(config, result)
        work = roofline.work_of(
            model,
            seq_len=section.seq_len,
            batch_size=section.batch_size,
            remat=config.parallel.remat,
            strategy=strategy,
            shards=mesh.context,
            zigzag=config.parallel.zigzag,
            backward=backward,
        )
        local = tokens // (mesh.data * mesh.fsdp * mesh.context)
        hbm = roofline.hbm_bytes(model, mesh, tokens=local, remat=config.parallel.remat, backward=backward)
        speed = roofline.estimate(work, hbm, result["collectives"], slices, tokens=tokens)
        if backward:
            speed["stage_tokens"] = section.steps * tokens
            speed["days"] = section.steps * speed["seconds"]["step"] / 86400
        smallest = model.hidden_size * model.num_kv_heads * model.head_dim // mesh.tensor
        lint = collectives.lint(result["collectives"], smallest)
        result |= {"flops": dataclasses.asdict(work), "estimate": speed, "lint": lint, "context_strategy": strategy}
    elif advice:
        result["advice"] = advise(config, stage, slices, name, result["shortage"], settings)
    return result


def _strategy(config, result) -> str:
    """Which strategy `auto` became, from the transfers."""
    if config.parallel.context_strategy != "auto":
        return config.parallel.context_strategy
    kinds = {t["kind"] for t in result["collectives"] if "context" in t["axes"] and t["hidden"]}
    return "ring" if "collective-permute" in kinds else "all_gather"


def formula(config: ConfigDict, stage: str) -> dict[str, float]:
    """`memory.estimate` of a stage."""
    section = config[stage]
    return memory.estimate(
        model_of(config),
        config.mesh,
        seq_len=section.seq_len,
        batch_size=section.batch_size,
        microbatches=section.microbatches,
        remat=config.parallel.remat,
        loss_chunk=section.loss_chunk,
        strategy=config.parallel.context_strategy,
    )


def advise(config, stage, slices, name, shortage, settings: Settings) -> list[str]:
    """What to change for a program to fit: sentences, the largest context or batch first, confirmed by compiling it."""
    section, mesh = config[stage], config.mesh
    needed, limit = shortage["needed"], shortage["limit"]
    said = []
    for field in ("batch_size", "seq_len"):
        step = mesh.data * mesh.fsdp * section.microbatches if field == "batch_size" else 2 * mesh.context * 128
        size = _largest(config, stage, slices, name, field, step, needed, limit, settings)
        if size:
            said.append(f"{stage}.{field}={size} fits (compiled); {section[field]} does not")
    if not said:
        said.append(f"neither a smaller batch nor shorter sequences fit on {slices} with this mesh")
        if config.model.param_dtype == "float32":
            light = copy.deepcopy(config).unlock()
            light.model.param_dtype = "bfloat16"
            size = _largest(light.lock(), stage, slices, name, "seq_len", 256 * mesh.context, needed, limit, settings)
            if size:
                said.append(
                    f"model.param_dtype=bfloat16 (parameters and moments) with {stage}.seq_len={size} fits (compiled)"
                )
    weaker = [r for r in REMAT_LADDER[REMAT_LADDER.index(config.parallel.remat) + 1 :]]
    if weaker:
        said.append(f"parallel.remat={weaker[0]} keeps less for the backward pass")
    if config.parallel.vocab_tiles < tiles_of(config):
        said.append(
            f"parallel.vocab_tiles={tiles_of(config)} never has the whole unembedding or its gradient on a device"
        )
    if section.microbatches < section.batch_size // (mesh.data * mesh.fsdp):
        said.append(f"{stage}.microbatches={section.microbatches * 2} halves the tokens in flight")
    if config.parallel.context_strategy == "all_gather":
        said.append("parallel.context_strategy=ring holds no gathered keys")
    state = formula(config, stage)["state"]
    said.append(
        f"parameters, optimizer and gradient take {state / 2**30:.1f} GiB of each device here; "
        f"a slice of twice the chips halves that"
    )
    return said


def _largest(config, stage, slices, name, field, step, needed, limit, settings) -> int:
    """A size of `field` that compiles, the largest by a formula fitted to what the compiler said, else by halving; or
    0."""
    section = config[stage]
    whole = formula(config, stage)
    scale = (needed - whole["state"]) / (whole["total"] - whole["state"])

    def total_of(size):
        guess = formula(changed(config, stage, **{field: size}), stage)
        return guess["state"] + scale * (guess["total"] - guess["state"])

    size = section[field] - step
    predicted = memory.largest(0.97 * limit, total_of, size, step)
    size = predicted or size // 2 // step * step
    for _ in range(5):
        if size < step:
            return 0
        other = changed(config, stage, **{field: size})
        request = compile.Request(other, stage, name, str(slices), quick=True)
        try:
            result = compile.compile_program(
                request, limit=settings.limit, cache=settings.cache, label=f"{stage}.{field}={size}"
            )
        except UserError:
            return 0
        if result["status"] == "fits":
            return size
        size = size // 2 // step * step
    return 0


def tiles_of(config: ConfigDict) -> int:
    """The fewest tiles, from 4 on, that divide the vocabulary of a device."""
    mesh = config.mesh
    own = config.tokenizer.vocab_size // (mesh.fsdp * mesh.context * mesh.tensor)
    return next((tiles for tiles in range(4, 33) if own % tiles == 0), 1)
