"""A plan of PPO as text for a terminal and as rows of a Markdown table."""

import io

from rich.console import Console
from rich.table import Table

from stepdr_jax.aot.report import gib, summed

COLUMNS = ("actor", "critic", "gradient", "sampler weights", "pages", "temporaries")


def text(plan: dict, width: int = 120) -> str:
    """The plan for a terminal of `width` columns."""
    out = io.StringIO()
    console = Console(file=out, width=width, highlight=False)
    mesh = " ".join(f"{axis}={size}" for axis, size in plan["mesh"].items())
    s, chosen, load = plan["sampler"], plan["placement"], plan["load"]
    console.print(
        f"{plan['config']}  ppo  on {plan['topology']}: {plan['chips']} chips, {plan['devices']} devices, "
        f"{plan['hosts']} hosts"
    )
    console.print(
        f"learner {mesh}, {plan['microbatch_sequences']} sequences of {plan['seq_len']:,} tokens a call, "
        f"remat {plan['parallel']['remat']}; "
        f"sampler {s['replicas']} x {s['tensor']} devices on each host, {chosen['sampler']}, "
        f"offload {chosen['offload']}",
    )
    console.print()
    console.print(_programs(plan))
    for name, program in plan["programs"].items():
        for sentence in program.get("lint", ()):
            console.print(f"  ! {name}: {sentence}", markup=False)
    for name, said in plan["advice"].items():
        console.print(f"\n{name}: DOES NOT FIT")
        for sentence in said:
            console.print(f"  - {sentence}", markup=False)
    for placement in plan.get("placements", ()):
        console.print()
        own = placement["offload"] == chosen["offload"]
        console.print(_heading(placement, plan["limit_bytes"], own))
        console.print(_phases(placement))
        for sentence in _episodes(placement, plan, load):
            console.print("  " + sentence)
    if "estimate" in plan:
        console.print()
        for line in _speed(plan):
            console.print(line)
    return out.getvalue().rstrip()


def _table(*titles: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for place, title in enumerate(titles):
        table.add_column(title, justify="right" if place else "left")
    return table


def _programs(plan: dict) -> Table:
    table = _table(
        "compiled program",
        "arguments",
        "temporaries",
        "GiB a device",
        "GiB of transfers",
        "hidden",
        "seconds to compile",
    )
    for name, program in plan["programs"].items():
        spent = f"{program['compile_seconds']:.0f}"
        if program["status"] != "fits":
            needed = f"{gib(program['shortage']['needed'])}: too much"
            table.add_row("  " + name, "", "", needed, "", "", spent)
            continue
        memory, rows = program["memory"], summed(program["collectives"])
        moved = sum(row["bytes"] for row in rows)
        hidden = sum(row["bytes"] for row in rows if row["way"] == "hidden")
        table.add_row(
            "  " + name,
            gib(memory["arguments"]),
            gib(memory["temporaries"]),
            gib(memory["total"]),
            gib(moved),
            f"{hidden / moved:.0%}" if moved else "",
            spent,
        )
    return table


def _heading(placement: dict, limit: float, own: bool) -> str:
    most = max(row["total"] for row in placement["phases"])
    verdict = "FITS" if placement["fits"] else "DOES NOT FIT"
    named = "this config" if own else f"with --config.placement.offload={placement['offload']}"
    return (
        f"sampler {placement['sampler']}, offload {placement['offload']} ({named}): {verdict}, "
        f"at most {gib(most)} of {gib(limit)} GiB a device ({most / limit:.0%})"
    )


def by_column(held: dict[str, int]) -> dict[str, int]:
    """Bytes of a phase under COLUMNS; a copy of the actor that is a reference or lags behind counts as actor."""
    columns = dict.fromkeys(COLUMNS, 0)
    for buffer, size in held.items():
        name = "gradient" if buffer.endswith("gradient") else buffer if buffer in COLUMNS else buffer.split()[0]
        columns["actor" if name in ("reference", "behaviour") else name] += size
    return columns


def _phases(placement: dict) -> Table:
    table = _table("  GiB a device", *COLUMNS, "total")
    for row in placement["phases"]:
        name = row["phase"] + ("" if row["device"] == "any" else f" ({row['device']}'s)")
        table.add_row(
            "  " + name, *(gib(size) if size else "" for size in by_column(row["bytes"]).values()), gib(row["total"])
        )
    return table


def _episodes(placement: dict, plan: dict, load: dict) -> list[str]:
    now, most = placement["episodes"], placement["episodes_that_fit"]
    page = plan["sampler"]["page_size"] or plan["seq_len"]
    said = [
        f"pages of {page} tokens, {placement['page_bytes'] / 2**20:.1f} MiB a device: {placement['pages']:,} are "
        f"asked for, {placement['pages_that_fit']:,} fit",
        f"episodes at once: {now['full_length_per_host']} a host of {plan['seq_len']:,} tokens, "
        f"{now['full_length']:,} in all; "
        f"{now['mean_length_per_host']} a host of {load['tokens']:,}, {now['mean_length']:,} in all",
        f"  with all pages that fit: {most['full_length_per_host']} and {most['full_length']:,}; "
        f"{most['mean_length_per_host']} and {most['mean_length']:,}",
    ]
    if placement["host_bytes"]:
        said.append(
            f"on a host's own memory: {gib(placement['host_bytes'])} GiB of the learner's state, and sampler.host_gb"
        )
    return said


def _speed(plan: dict) -> list[str]:
    sampler, iteration = plan["estimate"]["sampler"], plan["estimate"]["iteration"]
    seconds, each = iteration["seconds"], iteration["seconds_each"]
    lines = ["ESTIMATE, not measured"]
    for key, what in (("decode", "of mean length, half grown"), ("decode_full", "of full length")):
        d = sampler[key]
        lines.append(
            f"  decode, {d['sequences']} episodes {what}: {1000 * d['seconds']['step']:.1f} ms a step, "
            f"{d['tokens_per_second']:,.0f} tokens/s a replica, bound by {d['bound']} "
            f"(weights {gib(d['bytes_weights'])} + K/V {gib(d['bytes_kv'])} GiB a device: "
            f"{1000 * d['seconds']['hbm']:.1f} ms; arithmetic {1000 * d['seconds']['arithmetic']:.1f}; "
            f"transfers {1000 * d['seconds']['transfers']:.1f})"
        )
    p = sampler["prefill"]
    lines += [
        f"  prefill: {1000 * p['seconds']['call']:.0f} ms a call, {p['tokens_per_second']:,.0f} tokens/s a replica, "
        f"bound by {p['bound']}",
        f"  all {plan['hosts']} hosts: at most {sampler['tokens_per_second']:,.0f} sampled tokens/s "
        f"({sampler['tokens_per_second_hbm']:,.0f} by memory traffic alone), "
        f"{sampler['prefill_tokens_per_second']:,.0f} prefilled tokens/s",
        f"  an iteration of {iteration['episodes']:,} episodes, {iteration['sampled_tokens'] / 1e6:,.1f}M tokens "
        f"sampled and {iteration['observed_tokens'] / 1e6:,.1f}M observed: "
        f"at least {_clock(iteration['seconds_total'])}",
        f"    sampling {_clock(iteration['seconds_sampling'])} (decode {_clock(seconds['decode'])}, prefill "
        f"{_clock(seconds['prefill'])}), learning {_clock(iteration['seconds_learning'])}, weights to the sampler "
        f"{seconds['weights']:.1f} s",
        "    learning: " + ", ".join(f"{name} {n} x {each[name]:.2g} s" for name, n in iteration["calls"].items()),
        "  It assumes that " + "; ".join(plan["estimate"]["assumptions"]) + ".",
    ]
    return lines


def _clock(seconds: float) -> str:
    return (
        f"{seconds / 3600:.1f} h"
        if seconds >= 5400
        else f"{seconds / 60:.1f} min"
        if seconds >= 90
        else f"{seconds:.0f} s"
    )


def markdown_header() -> str:
    """Head of the table of markdown_rows."""
    return (
        "| slice, learner's mesh d,f,c,t | sampler, offload | learning: actor + critic + gradient + temporaries | "
        "sampling: state + weights + pages + temporaries | pages that fit | episodes of 128K: host, all | "
        "of mean length: host, all | result |\n|---|---|---|---|---:|---:|---:|---|"
    )


def markdown_rows(plan: dict) -> list[str]:
    """Each placement of a plan as a row; the two heaviest phases in GiB of a device."""
    mesh = ",".join(str(size) for size in plan["mesh"].values())
    if "placements" not in plan:
        said = "; ".join(sentence for advice in plan["advice"].values() for sentence in advice)
        return [f"| {plan['topology']}, {mesh} | {plan['placement']['sampler']} | | | | | | does not fit: {said} |"]
    rows = []
    for placement in plan["placements"]:
        learning = max(placement["phases"][2:], key=lambda row: row["total"])
        sampling = placement["phases"][1]
        a, b = by_column(learning["bytes"]), by_column(sampling["bytes"])
        most = placement["episodes_that_fit"]
        rows.append(
            f"| {plan['topology']}, {mesh} | {placement['sampler']}, {placement['offload']} | "
            f"{gib(a['actor'])} + {gib(a['critic'])} + {gib(a['gradient'])} + {gib(a['temporaries'])} = "
            f"**{gib(learning['total'])}** | "
            f"{gib(b['actor'] + b['critic'])} + {gib(b['sampler weights'])} + {gib(b['pages'])} + "
            f"{gib(b['temporaries'])} = "
            f"**{gib(sampling['total'])}** | {placement['pages_that_fit']:,} | "
            f"{most['full_length_per_host']}, {most['full_length']:,} | {most['mean_length_per_host']}, "
            f"{most['mean_length']:,} | {'fits' if placement['fits'] else 'does not fit'} |"
        )
    return rows
