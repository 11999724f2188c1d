"""Which mesh, recomputation, strategy and batch to take: formulas leave out what cannot win, the compiler judges the
rest.

Finished results are kept (`plan.Settings.cache`), so that an interrupted search continues where it stopped.
"""

import io
import itertools

from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from stepdr_jax.aot import plan as planning
from stepdr_jax.aot import report, roofline
from stepdr_jax.errors import UserError
from stepdr_jax.ops import context_layout
from stepdr_jax.progress import Progress
from stepdr_jax.sharding import topology

REMATS = ("layer", "attention", "offload")
STRATEGIES = ("ring", "all_gather", "ulysses")
_MARGIN = 1.15  # of the limit: the formula may be too high by this


def candidates(config: ConfigDict, stage: str, slices: topology.Topology) -> list[tuple[float, ConfigDict]]:
    """(seconds a token by formula, config) of every combination that the formulas do not rule out, best first."""
    section, model = config[stage], planning.model_of(config)
    heads = [t for t in (1, 2, 4, 8) if model.num_kv_heads % t == 0 and model.intermediate_size % t == 0]
    found = []
    for mesh, remat, strategy in itertools.product(topology.splits(slices, tensor=tuple(heads)), REMATS, STRATEGIES):
        if mesh["context"] == 1 and strategy != STRATEGIES[0]:
            continue  # there is nothing to choose
        rows = mesh["data"] * mesh["fsdp"]
        for batch in sorted({rows, 2 * rows, max(rows, section.batch_size // rows * rows)}):
            other = planning.changed(
                config,
                stage,
                mesh=mesh,
                parallel=dict(remat=remat, context_strategy=strategy),
                batch_size=batch,
                microbatches=1,
            )
            if (
                not _possible(other, stage, model)
                or planning.formula(other, stage)["total"] > _MARGIN * slices.generation.hbm
            ):
                continue
            found.append((_seconds(other, stage, slices, model) / (batch * section.seq_len), other))
    return sorted(found, key=lambda pair: pair[0])


def _possible(config, stage, model) -> bool:
    mesh, parallel = config.mesh, config.parallel
    try:
        context_layout.check_layout(
            config[stage].seq_len,
            model.num_heads // mesh.tensor,
            model.num_kv_heads // mesh.tensor,
            strategy=parallel.context_strategy,
            axis_size=mesh.context,
            zigzag=parallel.zigzag and mesh.context > 1,
            backend=parallel.attention,
        )
    except UserError:
        return False
    return config[stage].seq_len // mesh.context >= 256  # below, a device's part of a kernel's block is empty


def _seconds(config, stage, slices, model) -> float:
    """A step by formula alone, with the transfers that the program is known to make."""
    section, mesh, parallel = config[stage], config.mesh, config.parallel
    tokens = section.seq_len * section.batch_size
    local = tokens / (mesh.data * mesh.fsdp * mesh.context)
    work = roofline.work_of(
        model,
        seq_len=section.seq_len,
        batch_size=section.batch_size,
        remat=parallel.remat,
        strategy=parallel.context_strategy,
        shards=mesh.context,
        zigzag=parallel.zigzag,
    )
    hbm = roofline.hbm_bytes(model, mesh, tokens=local, remat=parallel.remat)
    layer = 2 * roofline.layer_parameters(model) / mesh.tensor
    transfers = [
        _transfer("all-gather", "context", mesh.context, layer, 3 * model.num_layers),
        _transfer("all-gather", "fsdp", mesh.fsdp, layer / mesh.context, 3 * model.num_layers),
        _transfer("all-reduce", "tensor", mesh.tensor, 2 * local * model.hidden_size, 6 * model.num_layers),
        _transfer("all-reduce", "data", mesh.data, 4 * model.num_layers * layer / 2 / mesh.fsdp / mesh.context, 1),
    ]
    seconds = roofline.estimate(work, hbm, transfers, slices, tokens=tokens)["seconds"]["step"]
    if mesh.context > 1:
        rows = section.batch_size / (mesh.data * mesh.fsdp)
        seconds += (
            rows
            * model.num_layers
            * context_layout.layer_seconds(
                section.seq_len,
                model.num_heads // mesh.tensor,
                model.num_kv_heads // mesh.tensor,
                model.head_dim,
                strategy=parallel.context_strategy,
                axis_size=mesh.context,
                speeds=slices.generation.speeds,
            )
        )
    return seconds


def _transfer(kind, axis, group, size, times) -> dict:
    return {"kind": kind, "axes": [axis], "group": group, "bytes": size, "times": times, "hidden": False}


def search(
    config: ConfigDict, stage: str, slices: topology.Topology, settings: planning.Settings, *, tries: int = 8
) -> list[dict]:
    """Plans of the `tries` most promising candidates, best estimate first; those that do not fit are last.

    Raises:
        UserError: no candidate can fit by formula.
    """
    listed = _varied(candidates(config, stage, slices), tries)
    if not listed:
        raise UserError(
            f"{stage}: nothing fits on {slices} even by formula; take a larger slice, or shorten {stage}.seq_len"
        )
    progress, plans = Progress(f"search on {slices}", len(listed), "candidates"), []
    quick = planning.Settings(quick=True, limit=settings.limit, cache=settings.cache)
    for other in listed:
        try:
            plans.append(planning.plan(other, stage, slices, ["train"], quick, advice=False))
        except UserError as error:  # a split that the program refuses: said, not fatal
            progress.update(refused=str(error)[:60])
            continue
        progress.update(fits=sum(p["fits"] for p in plans))
    return sorted(plans, key=lambda p: -_rate(p))


def _varied(ranked: list, tries: int) -> list[ConfigDict]:
    """The best, at most two of one mesh, so that the front spans more than one."""
    taken, count = [], {}
    for _, config in ranked:
        mesh = tuple(config.mesh.values())
        count[mesh] = count.get(mesh, 0) + 1
        if count[mesh] <= 2:
            taken.append(config)
    return taken[:tries]


def _rate(plan: dict) -> float:
    program = plan["programs"]["train"]
    return program["estimate"]["tokens_per_second_per_chip"] if plan["fits"] else 0.0


def front(plans: list[dict]) -> list[dict]:
    """Those that no other beats in both estimated tokens/s/chip and memory."""
    fitting = [p for p in plans if p["fits"]]
    held = lambda p: p["programs"]["train"]["memory"]["total"]  # noqa: E731

    def beaten(p):
        return any(
            _rate(o) >= _rate(p) and held(o) <= held(p) and (_rate(o), held(o)) != (_rate(p), held(p)) for o in fitting
        )

    return [p for p in fitting if not beaten(p)]


def text(plans: list[dict]) -> str:
    """A table of a search for a terminal; the Pareto front is starred."""
    best = front(plans)
    table = Table(box=None, padding=(0, 2, 0, 0), title=None)
    for title in ("", "mesh d,f,c,t", "sequences", "strategy", "remat", "GiB", "step s*", "tokens/s/chip*", "MFU*"):
        table.add_column(title)
    for p in plans:
        mesh, program = ",".join(map(str, p["mesh"].values())), p["programs"]["train"]
        row = [
            "★" if p in best else "",
            mesh,
            str(p["batch_size"]),
            p["parallel"]["context_strategy"],
            p["parallel"]["remat"],
        ]
        if p["fits"]:
            e = program["estimate"]
            row += [report.gib(program["memory"]["total"]), f"{e['seconds']['step']:.2f}"]
            row += [f"{e['tokens_per_second_per_chip']:.0f}", f"{e['mfu']:.1%}"]
        else:
            row += [f"{report.gib(program['shortage']['needed'])}: too much", "", "", ""]
        table.add_row(*row)
    out = io.StringIO()
    console = Console(file=out, width=120, highlight=False)
    console.print(table)
    console.print("★ Pareto front of memory and estimated speed. * estimate, not measured (docs/plans.md)")
    return out.getvalue().rstrip()
