"""A plan as text for a terminal and as rows of a Markdown table."""

import io

from rich.console import Console
from rich.table import Table

from stepdr_jax.aot.roofline import ASSUMPTIONS

GIB = 2**30


def gib(size: float) -> str:
    """Bytes as GiB with two decimals."""
    return f"{size / GIB:.2f}"


def text(plan: dict, width: int = 120) -> str:
    """The plan for a terminal of `width` columns."""
    out = io.StringIO()
    console = Console(file=out, width=width, highlight=False)
    mesh = " ".join(f"{axis}={size}" for axis, size in plan["mesh"].items())
    console.print(
        f"{plan['config']}  {plan['stage']}  on {plan['topology']}: {plan['chips']} chips, {plan['devices']} devices"
    )
    console.print(
        f"mesh {mesh}; {plan['batch_size']} sequences of {plan['seq_len']:,} tokens a step; "
        f"remat {plan['parallel']['remat']}"
    )
    for name, program in plan["programs"].items():
        console.print()
        (_fitting if program["status"] == "fits" else _short)(console, name, program, plan)
    return out.getvalue().rstrip()


def _fitting(console: Console, name: str, program: dict, plan: dict) -> None:
    memory, limit = program["memory"], plan["limit_bytes"]
    share = memory["total"] / limit
    console.print(f"{name} step: FITS, {gib(memory['total'])} of {gib(limit)} GiB a device ({share:.0%})")
    kinds = ", ".join(f"{kind} {gib(memory[kind])}" for kind in memory if kind != "total" and memory[kind] >= 2**20)
    console.print(f"  GiB: {kinds}")
    for buffer in program["buffers"][:5]:
        console.print(f"    {gib(buffer['bytes']):>6}  {_clip(buffer['shapes'], 90)}", markup=False)
    flops, estimate = program["flops"], program["estimate"]
    model = flops["model_products"] + flops["model_attention"]
    done = flops["done_products"] + flops["done_attention"]
    console.print(
        f"  FLOPs a step: {model:.3g} of the model (attention {flops['model_attention'] / model:.0%}, causal), "
        f"{done:.3g} executed ({done / model:.2f}x)"
    )
    console.print(_table(program["collectives"]))
    for sentence in program["lint"]:
        console.print(f"  ! {sentence}", markup=False)
    seconds = {cause: s for cause, s in estimate["seconds"].items() if cause != "step"}
    listed = ", ".join(f"{cause.replace('_', ' ')} {s:.3g}" for cause, s in seconds.items())
    console.print(
        f"  ESTIMATE, not measured: {estimate['seconds']['step']:.3g} s a step, bound by {estimate['bound']} "
        f"(s: {listed})"
    )
    line = (
        f"  {estimate['tokens_per_second']:,.0f} tokens/s, {estimate['tokens_per_second_per_chip']:,.0f} a chip, "
        f"MFU {estimate['mfu']:.1%}"
    )
    if "days" in estimate:
        line += f"; {estimate['stage_tokens'] / 1e9:.3g}B tokens of the stage in {estimate['days']:.3g} days"
    console.print(line)
    if name == "train":
        console.print("  It assumes that " + "; ".join(ASSUMPTIONS) + ".")
    console.print(
        f"  compiled in {program['compile_seconds']:.0f} s after {program['lower_seconds']:.0f} s of tracing, "
        f"{program['rss_bytes'] / GIB:.1f} GiB of host memory"
        + (f"; saved to {program['saved']}, which loads on this TPU slice only" if program.get("saved") else "")
    )


def _short(console: Console, name: str, program: dict, plan: dict) -> None:
    shortage = program["shortage"]
    console.print(
        f"{name} step: DOES NOT FIT, needs {gib(shortage['needed'])} of {gib(shortage['limit'])} GiB a device "
        f"(known after {program['compile_seconds']:.0f} s)"
    )
    for sentence in program["advice"]:
        console.print(f"  - {sentence}", markup=False)


def summed(transfers: list[dict]) -> list[dict]:
    """Transfers of one kind, axis and way of hiding as one row: times, bytes of a step on one device, largest."""
    rows: dict[tuple, dict] = {}
    for t in transfers:
        way = "hidden" if t["hidden"] else "synchronous" if t["synchronous"] else "exposed"
        row = rows.setdefault((t["kind"], tuple(t["axes"]), way), {"times": 0, "bytes": 0, "largest": 0})
        row["times"] += t["times"]
        row["bytes"] += t["bytes"] * t["times"]
        row["largest"] = max(row["largest"], t["bytes"])
    listed = [dict(kind=kind, axes=list(axes), way=way, **row) for (kind, axes, way), row in rows.items()]
    return sorted(listed, key=lambda row: -row["bytes"])


def _table(transfers: list[dict]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for title, side in (
        ("  transfer", "left"),
        ("axis", "left"),
        ("schedule", "left"),
        ("times", "right"),
        ("GiB a step", "right"),
        ("largest MiB", "right"),
    ):
        table.add_column(title, justify=side)
    rows = summed(transfers)
    small = [row for row in rows if row["bytes"] < 2**20]
    for row in rows:
        if row["bytes"] >= 2**20:
            table.add_row(
                "  " + row["kind"],
                ", ".join(row["axes"]),
                row["way"],
                f"{row['times']:,}",
                gib(row["bytes"]),
                f"{row['largest'] / 2**20:.1f}",
            )
    if small:
        table.add_row("  others", "", "", f"{sum(row['times'] for row in small):,}", "0.00", "<1")
    return table


def _clip(line: str, width: int) -> str:
    return line if len(line) <= width else line[: width - 1] + "…"


def markdown_header() -> str:
    """Head of the table of markdown_row."""
    return (
        "| slice | mesh d,f,c,t | tokens x sequences | strategy, remat | arguments | temporaries | total GiB | limit | "
        "step s* | tokens/s/chip* | MFU* | result |\n|---|---|---|---|---:|---:|---:|---:|---:|---:|---:|---|"
    )


def markdown_row(plan: dict) -> str:
    """The train step of a plan as a row."""
    program = plan["programs"]["train"]
    mesh = ",".join(str(size) for size in plan["mesh"].values())
    strategy = program.get("context_strategy", plan["parallel"]["context_strategy"])
    cells = [
        plan["topology"],
        mesh,
        f"{plan['seq_len'] // 1024}K x {plan['batch_size']}",
        f"{strategy}, {plan['parallel']['remat']}",
    ]
    if program["status"] == "fits":
        memory, estimate = program["memory"], program["estimate"]
        cells += [
            gib(memory["arguments"]),
            gib(memory["temporaries"]),
            f"**{gib(memory['total'])}**",
            gib(plan["limit_bytes"]),
        ]
        cells += [
            f"{estimate['seconds']['step']:.1f}",
            f"{estimate['tokens_per_second_per_chip']:.0f}",
            f"{estimate['mfu']:.0%}",
        ]
        cells.append("fits")
    else:
        shortage = program["shortage"]
        cells += ["", "", f"**{gib(shortage['needed'])}**", gib(shortage["limit"]), "", "", ""]
        cells.append(f"does not fit ({program['compile_seconds']:.0f} s): " + "; ".join(program["advice"][:2]))
    return "| " + " | ".join(cells) + " |"
