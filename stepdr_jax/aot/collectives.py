"""Every transfer of a compiled program: over which mesh axis, how often, how many bytes, and whether work hides it."""

import itertools
import re
from collections.abc import Iterator, Mapping

import numpy as np

from stepdr_jax.aot.schedule import Instruction, Program, transfers

_MATRIX_PRODUCTS = ("convolution", "dot")
_CONSTANT = re.compile(r"\((-?\d+)\)")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
_LISTS = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}")


def trip_count(program: Program, loop: Instruction) -> int:
    """Iterations of a `while` that counts from 0 to a constant, as lax.scan does; 1 if it cannot be told."""
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest)
    if known:
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
    body = program.get(condition[1], []) if condition else []
    bounds = {
        i.name: int(_CONSTANT.match(i.rest)[1]) for i in body if i.opcode == "constant" and _CONSTANT.match(i.rest)
    }
    for instruction in body:
        if instruction.opcode == "compare" and "direction=LT" in instruction.rest:
            found = [bounds[name] for name in instruction.operands if name in bounds]
            if found:
                return found[0]
    return 1


def executions(program: Program) -> dict[str, tuple[int, ...]]:
    """Trip counts of the loops around each computation, outermost first, as run from the entry.

    A computation reached twice keeps the path with most executions; both branches of a conditional count as run.
    """
    found: dict[str, tuple[int, ...]] = {}

    def walk(name: str, loops: tuple[int, ...]):
        if name in found and np.prod(found[name]) >= np.prod(loops):
            return
        found[name] = loops
        for instruction in program.get(name, ()):
            inside = loops
            if instruction.opcode == "while":
                inside = (*loops, trip_count(program, instruction))
            for called in instruction.called:
                walk(called, inside)

    if program:
        walk(list(program)[-1], ())
    return found


def axes_of(rest: str, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Mesh axes along which the devices of one group, or the ends of one permute, differ.

    Args:
        rest: an HLO instruction from its operands on.
        sizes: mesh axis -> size; partition ids number the mesh's devices in order.
    """
    groups = _groups(rest, int(np.prod(list(sizes.values()))))
    if groups is None:
        return ()
    places = np.array(np.unravel_index(groups, tuple(sizes.values())))  # axis, group, member
    differ = (places != places[:, :, :1]).any(axis=(1, 2))
    return tuple(axis for axis, moves in zip(sizes, differ, strict=True) if moves)


def _groups(rest: str, devices: int) -> np.ndarray | None:
    """int[groups, members] of partition ids."""
    iota = _IOTA.search(rest)
    if iota:
        shape, tile, order = (tuple(int(n) for n in part.split(",")) if part else None for part in iota.groups())
        ids = np.arange(np.prod(tile)).reshape(tile)
        return (ids.transpose(order) if order else ids).reshape(shape)
    mesh = _MESH.search(rest)
    if mesh:
        named = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        moving = [list(named).index(name) for name in re.findall(r"'([^']+)'", mesh[2])]
        still = [axis for axis in range(len(named)) if axis not in moving]
        ids = np.arange(devices).reshape(tuple(named.values())).transpose(still + moving)
        return ids.reshape(-1, int(np.prod([list(named.values())[axis] for axis in moving])))
    lists = _LISTS.search(rest)
    if not lists:
        return None
    groups = [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", lists[1])]
    if len({len(group) for group in groups}) != 1:
        return None
    return np.array(groups)


def _hides(program: Program, instructions) -> bool:
    """A Pallas kernel or a matrix product is among `instructions` or in what they call."""
    return any(
        i.is_kernel
        or i.opcode in _MATRIX_PRODUCTS
        or _hides(program, itertools.chain(*map(program.get, _bodies(program, i))))
        for i in instructions
    )


def _bodies(program: Program, instruction: Instruction) -> Iterator[str]:
    return (name for name in instruction.called if name in program)


def summarise(program: Program, sizes: Mapping[str, int]) -> list[dict]:
    """Transfers as plain data, largest total first.

    Each has kind, axes, group (devices in one), bytes (whole array that a device sends, gathers or reduces, once),
    times (executions in a step), loops (trip counts around it), synchronous, hidden (a kernel or matrix product is
    scheduled between start and done), kernels, name and scope (the line of the model it comes from).
    """
    loops = executions(program)
    instructions = {(name, i.name): i for name, body in program.items() for i in body}
    found = []
    for transfer in transfers(program):
        around = loops.get(transfer.computation)
        if around is None:  # not reached: an asynchronous wrapper's inside
            continue
        rest = _rest(program, instructions[transfer.computation, transfer.name])
        axes = axes_of(rest, sizes)
        group = int(np.prod([sizes[axis] for axis in axes]))
        size = transfer.payload * (group if transfer.kind == "reduce-scatter" else 1)
        found.append(
            {
                "kind": transfer.kind,
                "axes": list(axes),
                "group": group,
                "bytes": size,
                "times": int(np.prod(around)),
                "loops": list(around),
                "synchronous": transfer.synchronous,
                "hidden": not transfer.synchronous and _hides(program, transfer.between),
                "kernels": len(transfer.kernels),
                "name": transfer.name,
                "scope": _scope(rest),
            }
        )
    return sorted((t for t in found if t["group"] > 1), key=lambda t: -t["bytes"] * t["times"])


def _rest(program: Program, instruction: Instruction) -> str:
    """The text with the groups: of the instruction, or of the collective inside the computation that it starts."""
    if "replica_groups" in instruction.rest or "source_target_pairs" in instruction.rest:
        return instruction.rest
    inside = [i.rest for name in instruction.called for i in program.get(name, ())]
    return next((rest for rest in inside if "replica_groups" in rest or "source_target_pairs" in rest), "")


def _scope(rest: str) -> str:
    found = re.search(r'op_name="([^"]*)"', rest)
    return found[1] if found else ""


def lint(found: list[dict], smallest_kernel: int) -> list[str]:
    """Sentences about transfers that cost more than they must.

    Args:
        found: from summarise.
        smallest_kernel: elements of the smallest kernel of a layer; an all-reduce of as many is of a whole gradient.
    """
    said = []
    for t in found:
        where = f"{t['name']} over {', '.join(t['axes'])}"
        if t["kind"] == "collective-permute" and t["synchronous"]:
            said.append(f"synchronous permute: {where}, nothing runs beside it")
        if t["kind"] == "all-reduce" and t["bytes"] >= 2 * smallest_kernel:
            said.append(
                f"all-reduce of a whole gradient: {where}, {t['bytes'] / 2**20:.0f} MiB; a reduce-scatter is half"
            )
        if t["kind"] == "all-reduce" and t["loops"] and t["bytes"] >= 2**20:
            said.append(f"all-reduce in a loop: {where}, {t['times']} times {t['bytes'] / 2**20:.1f} MiB")
        exposed = t["kind"] == "collective-permute" and not t["synchronous"] and not t["hidden"]
        if exposed and t["bytes"] >= 2**20:
            said.append(
                f"exposed permute: {where}, {t['times']} times {t['bytes'] / 2**20:.1f} MiB with no kernel beside it"
            )
    return said
