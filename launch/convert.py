"""Converts between Hugging Face's Qwen2.5 checkpoints and this project's.

  python -m launch.convert --hf=Qwen2.5-0.5B --out=runs/start                     weights to train from
  python -m launch.convert --checkpoint=runs/mine/seed0/sft --hf_out=exported     a folder that transformers loads

--out becomes a folder of one checkpoint, of step 0, in the layout that training writes: stacked layers, parameters
alone, float32 unless --dtype says otherwise. --checkpoint takes such a folder, a trained stage (its latest whole
checkpoint is used, or that of --step; the optimizer's state is left behind). --out and --checkpoint may be
gs://BUCKET/PATH or s3://BUCKET/PATH; a stage kept there finds its tokenizer in --config.run_dir. Both write under
another name first, so that an interrupted command leaves nothing that loads. Parameters are spread over config.mesh, or
over all devices if that is one; JAX_PLATFORMS=cpu keeps them in host memory. Tokenizer files go along where they are
found.
"""

import dataclasses
import sys
from pathlib import Path

from absl import flags

from launch import entry
from stepdr_jax.errors import UserError
from stepdr_jax.progress import Progress

_HF = flags.DEFINE_string("hf", "", "folder with config.json and safetensors to read; goes with --out")
_OUT = flags.DEFINE_string("out", "", "folder of checkpoints to make")
_CHECKPOINT = flags.DEFINE_string("checkpoint", "", "stage, or folder of checkpoints, to read; goes with --hf_out")
_HF_OUT = flags.DEFINE_string("hf_out", "", "folder to make for transformers")
_STEP = flags.DEFINE_integer("step", -1, "with --checkpoint: of this step, not the latest")
_DTYPE = flags.DEFINE_string("dtype", "", "float32 or bfloat16: of what is written (default: float32, or as it was)")
_LONGEST = flags.DEFINE_integer(
    "max_position_embeddings", 0, "longest sequence to declare to transformers (default: what YaRN reaches)"
)

# What tokenizers of Qwen2.5 and their settings for chat and generation are kept in.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


def main(config) -> None:
    into, out_of = (_HF.value, _OUT.value), (_CHECKPOINT.value, _HF_OUT.value)
    if _DTYPE.value not in ("", "float32", "bfloat16"):
        raise UserError(f"expected --dtype to be float32 or bfloat16, got {_DTYPE.value!r}")
    if all(into) and not any(out_of):
        to_checkpoint(config, Path(_HF.value), _OUT.value, _DTYPE.value or "float32")
    elif all(out_of) and not any(into):
        step = _STEP.value if _STEP.value >= 0 else None
        to_hf(config, _CHECKPOINT.value, Path(_HF_OUT.value), _DTYPE.value or None, _LONGEST.value or None, step)
    else:
        raise UserError("expected --hf=FOLDER --out=FOLDER or --checkpoint=FOLDER --hf_out=FOLDER")


def to_checkpoint(config, source: Path, target: str | Path, dtype: str) -> None:
    """Reads a Hugging Face folder onto config.mesh and writes it as step 0 of the new folder `target`."""
    from stepdr_jax.models import hf
    from stepdr_jax.runtime import checkpoint, storage

    target = storage.location(target)
    _require_new(target, "--out")
    model, params = hf.load(source, mesh=_mesh(config), param_dtype=dtype, report=_bar("reading"))
    _say(f"writing {target}")
    metadata = {"stage": "hf", "model": dataclasses.asdict(model), "source": str(source.resolve())}
    copied = _copy_tokenizer(source, target / "tokenizer")  # first: the checkpoint is what makes the folder count
    checkpoint.save_checkpoint(target, 0, {"params": params}, metadata, keep=1)
    _say(f"done: {target}  {_billions(params)}  {dtype}  {copied} tokenizer and settings files copied")


def to_hf(
    config, source: str | Path, target: Path, dtype: str | None, longest: int | None, step: int | None = None
) -> None:
    """Reads the checkpoint of `step`, or the latest, under `source` onto config.mesh and writes the folder `target`."""
    from stepdr_jax.models import hf
    from stepdr_jax.models.qwen2 import Qwen2Config, param_shapes
    from stepdr_jax.runtime import checkpoint, storage
    from stepdr_jax.sharding.rules import param_shardings

    _require_new(target, "--hf_out")
    directory = _find(source)
    mesh = _mesh(config)

    def abstract(metadata):
        import jax

        shapes = param_shapes(Qwen2Config(**metadata["model"]))
        placed = param_shardings(shapes, mesh)
        return {"params": jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, placed)}

    _say(f"reading {directory}")
    restored = checkpoint.restore_checkpoint(directory, abstract, step=step)
    model, params = Qwen2Config(**restored.metadata["model"]), restored.tree["params"]
    # A stage shares the tokenizer of its run: RUN_DIR/tokenizer beside RUN_DIR/seed0/sft/checkpoints.
    beside = storage.location(source)
    homes = [directory, beside, *beside.parents[:3]] if isinstance(beside, Path) else [directory, Path(config.run_dir)]
    copied = next((n for home in homes if (n := _copy_tokenizer(home / "tokenizer", target))), 0)
    hf.save(model, params, target, dtype=dtype, max_position_embeddings=longest, report=_bar("writing"))
    _say(f"done: {target}  step {restored.step}  {_billions(params)}  {copied} tokenizer and settings files copied")


def _mesh(config):
    import jax

    from stepdr_jax.sharding.mesh import make_mesh

    one = all(size == 1 for size in dict(config.mesh).values())
    return make_mesh(fsdp=jax.device_count()) if one else make_mesh(**config.mesh)


def _find(source: str | Path):
    """What holds the checkpoints of a stage's folder, which may keep them elsewhere, or of itself."""
    from stepdr_jax.runtime import checkpoint, storage
    from stepdr_jax.runtime.layout import StageLayout

    source = storage.location(source)
    elsewhere = [StageLayout(source).recorded().checkpoint_dir] if isinstance(source, Path) else []
    for folder in (source, source / "checkpoints", *elsewhere):
        if checkpoint.saved_steps(folder):
            return folder
    raise UserError(
        f"{source} has no checkpoint; give a stage's folder such as RUN_DIR/seed0/sft, "
        "its checkpoints, or what --out made"
    )


def _require_new(folder, flag: str) -> None:
    """Nothing may be there but what an interrupted command left."""
    left = {"tokenizer", *TOKENIZER_FILES}
    if isinstance(folder, Path):
        taken = folder.is_file() or any(p.name not in left and p.name[0] != "." for p in folder.glob("*"))
    else:  # without a manifest nothing is there
        taken = any(name.endswith("manifest.json") for name in folder.names())
    if taken:
        raise UserError(f"{folder} is there already; give {flag} another name or delete it")


def _copy_tokenizer(source, target) -> int:
    copied = 0
    for name in TOKENIZER_FILES:
        try:
            data = (source / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            continue
        if isinstance(target, Path):
            target.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(data)
        copied += 1
    return copied


def _bar(stage: str):
    """Reports of bytes as a bar."""
    bar, size = None, 1

    def report(done: int, total: int) -> None:
        nonlocal bar, size
        if bar is None:
            size = 10**6 if total >= 10**7 else 10**3
            bar = Progress(stage, total // size, "MB" if size == 10**6 else "kB", every=5)
        if done == total or bar.done < done // size < bar.total:  # a rounded total is reached once
            bar.update(done // size - bar.done)

    return report


def _billions(params) -> str:
    import jax

    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    return f"{count / 1e9:.2f}B parameters" if count >= 1e7 else f"{count} parameters"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    entry.run(main, __doc__)
