"""What a compiled program holds on a device: by kind, its largest buffers, and what the compiler says when it is too
much."""

import math
import re
from pathlib import Path

_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_USED = re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", re.IGNORECASE)
_TEMPORARIES = re.compile(r"HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)")
_ALLOCATION = re.compile(r"^allocation \d+: size (\d+), page \d+, (.*)$")
_ROW = re.compile(r"^\s*[\d.]+\w+\(\s*\d+%\);\s*([\d.]+)(\w+)\(?[^;]*;\s*\d+;\s*\d+;\s*(.*)$")


def by_kind(stats) -> dict[str, int]:
    """Bytes on one device of a jax CompiledMemoryStats: arguments, outputs, aliased (outputs that reuse arguments),
    temporaries, code, and their sum without double counting, total. host_temporaries: of the host's memory."""
    kinds = {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "aliased": stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }
    kinds["total"] = sum(kinds.values()) - 2 * kinds["aliased"]
    kinds["host_temporaries"] = stats.host_temp_size_in_bytes
    return kinds


def by_allocation(dump: Path) -> dict[str, int]:
    """As by_kind, from the buffer assignment dumped before code is generated; outputs are those that reuse nothing."""
    text = max(dump.glob("*buffer-assignment.txt"), key=lambda path: path.stat().st_size).read_text()
    kinds = dict.fromkeys(("arguments", "outputs", "aliased", "temporaries"), 0)
    for line in text.splitlines():
        found = _ALLOCATION.match(line)
        if not found:
            continue
        size, kind = int(found[1]), found[2]
        if "color 0" not in kind and "color" in kind:  # another memory than HBM
            continue
        if kind.startswith("parameter"):
            kinds["arguments"] += size
            if "maybe-live-out" in kind:
                kinds["outputs"] += size
                kinds["aliased"] += size
        elif kind.startswith("preallocated-temp"):
            kinds["temporaries"] += size
        elif kind.startswith("maybe-live-out") or kind.startswith("output"):
            kinds["outputs"] += size
    return kinds | {"total": sum(kinds.values()) - 2 * kinds["aliased"]}


def shortage(message: str) -> dict[str, float] | None:
    """{"needed", "limit"} in bytes from the compiler's out-of-memory error; None if the message says something else.

    Of its two forms one speaks of temporaries, but its number includes the arguments.
    """
    found = _USED.search(message) or _TEMPORARIES.search(message)
    if not found:
        return None
    needed, unit, limit, limit_unit = found.groups()
    return {"needed": float(needed) * _UNITS[unit.upper()], "limit": float(limit) * _UNITS[limit_unit.upper()]}


def report_of(dump: Path) -> Path | None:
    """The memory-usage report of the largest module dumped to `dump`."""
    found = list(dump.glob("*memory-usage-report.txt"))
    return max(found, key=lambda path: path.stat().st_size) if found else None


def top_buffers(dump: Path, count: int = 12) -> list[dict]:
    """The largest buffers of a program that was dumped to `dump`: {"bytes", "shapes"}, shapes that share it in turn."""
    report = report_of(dump)
    if report is None:
        return []
    space = report.read_text().split("Memory Space:")[1]
    rows = []
    for line in space.splitlines():
        found = _ROW.match(line)
        if found:
            size = float(found[1]) * _UNITS[found[2].removesuffix("iB").removesuffix("B").upper()]
            rows.append({"bytes": int(size), "shapes": found[3].strip()})
    return sorted(rows, key=lambda row: -row["bytes"])[:count]


def estimate(
    model,
    mesh: dict[str, int],
    *,
    seq_len: int,
    batch_size: int,
    microbatches: int,
    remat: str,
    loss_chunk: int,
    strategy: str = "ring",
) -> dict[str, float]:
    """Bytes on one device by formula, to leave out splits that cannot fit before compiling any; low rather than high.

    Args:
        model: Qwen2Config.
        mesh: sizes by axis.
        seq_len, batch_size, microbatches, loss_chunk: of the stage.
        remat, strategy: of config.parallel.

    Returns:
        state (parameters, Adam's moments, gradient), saved (what layers keep for the backward pass), weights (gathered
        layer and head), work (of one layer and the vocabulary loss), total.
    """
    D, L, F, V, K = model.hidden_size, model.num_layers, model.intermediate_size, model.vocab_size, model.head_dim
    H, N = model.num_heads, model.num_kv_heads
    width = 2 if model.dtype == "bfloat16" else 4
    master = 2 if model.param_dtype == "bfloat16" else 4
    tensor, shards = mesh["tensor"], mesh["fsdp"] * mesh["context"] * mesh["tensor"]
    layer = D * (2 * H * K + 2 * N * K) + 3 * D * F
    head = V * D * (1 if model.tie_embeddings else 2)
    tokens = seq_len * batch_size / microbatches / (mesh["data"] * mesh["fsdp"] * mesh["context"])
    state = 4 * master * (L * layer + head) / shards
    inputs = width * tokens * D
    per_layer = {
        "layer": inputs,
        "offload": 0,
        "attention": inputs + width * tokens * H * K / tensor + 4 * tokens * H / tensor,
        "none": width * tokens * (6 * D + (3 * H + 4 * N) * K / tensor + 3 * F / tensor),
    }[remat]
    saved = L * per_layer
    weights = 2 * width * layer / tensor + (width + 4) * V * D / tensor
    gathered = 8 * seq_len * batch_size / microbatches / mesh["data"] / mesh["fsdp"] * N * K / tensor
    work = tokens * (3 * width * F / tensor + 6 * 4 * H * K / tensor) + 8 * min(loss_chunk, tokens) * V / tensor
    work += gathered if strategy == "all_gather" and mesh["context"] > 1 else 0
    return {
        "state": state,
        "saved": saved,
        "weights": weights,
        "work": work,
        "total": state + saved + max(weights, work),
    }


def largest(limit: float, total_of, high: int, multiple: int) -> int:
    """The largest multiple of `multiple` up to `high` whose total_of(size) is at most `limit` bytes; 0 if none is."""
    low, up = 0, max(high // multiple, 0)
    while low < up:
        middle = math.ceil((low + up) / 2)
        low, up = (middle, up) if total_of(middle * multiple) <= limit else (low, middle - 1)
    return low * multiple
