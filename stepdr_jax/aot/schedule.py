"""Reads the scheduled HLO that XLA dumps: in which order a compiled program computes, transfers and waits.

The text is the `*after_codegen.txt` of a compilation with compiler options xla_dump_to and xla_dump_hlo_as_text.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from pathlib import Path

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
_SCATTER = "all-reduce-scatter"  # how XLA calls the computation of a fused reduce-scatter
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^  (?:ROOT )?%?([\w.\-]+) = (.*)$", re.DOTALL)
_OPCODE = re.compile(r" ([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|called_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_OPERAND = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation; `rest` is the text from the opening bracket of the operands on."""

    name: str
    opcode: str
    shape: str
    rest: str

    @property
    def operands(self) -> list[str]:
        """Names of the operands."""
        depth, end = 0, 0
        for end, character in enumerate(self.rest):  # noqa: B007
            depth += (character == "(") - (character == ")")
            if not depth:
                break
        return _OPERAND.findall(self.rest[:end])

    @property
    def called(self) -> list[str]:
        """Names of the computations that it runs."""
        branches = [name for group in _BRANCHES.findall(self.rest) for name in _OPERAND.findall(group)]
        return _CALLED.findall(self.rest) + branches

    @property
    def is_kernel(self) -> bool:
        """A Pallas (Mosaic) kernel."""
        return self.opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in self.rest


Program = dict[str, list[Instruction]]  # computation -> its instructions in schedule order


def read_schedule(directory: str | Path) -> Program:
    """The scheduled program of the one module dumped to `directory`.

    Raises:
        FileNotFoundError: there is none, or more than one.
    """
    found = sorted(Path(directory).glob("*after_codegen.txt"))
    if len(found) != 1:
        raise FileNotFoundError(f"expected one *after_codegen.txt in {directory}, found {len(found)}")
    return parse(found[0].read_text())


def parse(text: str) -> Program:
    """Computations of an HLO module's text; the entry computation is last."""
    program, current, entry, pending = {}, None, None, []

    def flush():
        if pending:
            instruction = _instruction("\n".join(pending))
            if instruction:
                program[current].append(instruction)
            pending.clear()

    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            current = header[2]
            program[current] = []
            entry = current if header[1] else entry
        elif line == "}" and current:
            flush()
            current = None
        elif current:
            if _INSTRUCTION.match(line):
                flush()
            pending.append(line)
    if entry:
        program[entry] = program.pop(entry)
    return program


def _instruction(text: str) -> Instruction | None:
    found = _INSTRUCTION.match(text)
    opcode = found and _OPCODE.search(found[2])
    if not opcode:
        return None
    return Instruction(found[1], opcode[1], found[2][: opcode.start()], found[2][opcode.end() - 1 :])


def shape_bytes(shape: str) -> int:
    """Bytes of an HLO shape, the sum over a tuple, without the padding of tiled layouts."""
    total = 0
    for kind, dims in _ARRAY.findall(shape):
        bits = 8 if kind == "pred" else int(re.search(r"\d+", kind)[0])
        total += math.prod(int(d) for d in dims.split(",") if d) * bits // 8
    return total


@dataclasses.dataclass(frozen=True)
class Transfer:
    """One collective in the schedule.

    kind: one of COLLECTIVES. payload: bytes that arrive on a device. synchronous: nothing can run beside it.
    kernels: names of the Pallas kernels that run between its start and its done, also inside called computations.
    between: all instructions of its own computation between the two.
    """

    computation: str
    name: str
    kind: str
    payload: int
    synchronous: bool
    kernels: tuple[str, ...] = ()
    between: tuple[Instruction, ...] = ()


def kernels_of(program: Program, instructions) -> Iterator[str]:
    """Names of the Pallas kernels among `instructions` and in what they call."""
    for instruction in instructions:
        if instruction.is_kernel:
            yield instruction.name
        for name in instruction.called:
            yield from kernels_of(program, program.get(name, ()))


def transfers(program: Program) -> list[Transfer]:
    """Every collective of the program, computation by computation, in schedule order of the starts.

    Covers plain collectives, `X-start`/`X-done`, `async-start`/`async-done` around a computation with one inside, and
    the fusion of an all-reduce with a slice that is how a reduce-scatter mostly looks on a TPU.
    """
    wrapped = {
        name
        for body in program.values()
        for instruction in body
        for name in instruction.called
        if instruction.opcode == "async-start" or name.startswith(_SCATTER)
    }
    found = []
    for computation, body in program.items():
        if computation in wrapped:
            continue
        for at, instruction in enumerate(body):
            kind, start = _kind(program, instruction)
            if kind is None:
                continue
            if not start:
                size = shape_bytes(instruction.shape)
                found.append(Transfer(computation, instruction.name, kind, size, True))
                continue
            done = next(i for i in range(at + 1, len(body)) if _ends(body[i], instruction.name, body))
            between = tuple(body[at + 1 : done])
            size = shape_bytes(body[done].shape)
            kernels = tuple(kernels_of(program, between))
            found.append(Transfer(computation, instruction.name, kind, size, False, kernels, between))
    return found


def _kind(program: Program, instruction: Instruction) -> tuple[str | None, bool]:
    if instruction.opcode == "async-start":
        inner = [i.opcode for name in instruction.called for i in program.get(name, ())]
        return next((opcode for opcode in inner if opcode in COLLECTIVES), None), True
    if instruction.opcode == "fusion" and any(name.startswith(_SCATTER) for name in instruction.called):
        return "reduce-scatter", False
    base = instruction.opcode.removesuffix("-start")
    return (base if base in COLLECTIVES else None), base != instruction.opcode


def _ends(instruction: Instruction, start: str, body) -> bool:
    """`done` of `start`; async-update steps in between pass the handle on."""
    if not instruction.opcode.endswith("-done"):
        return False
    names = {start} | {i.name for i in body if i.opcode == "async-update" and start in i.operands}
    return bool(names & set(instruction.operands))
