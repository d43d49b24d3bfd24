"""What instructions on floats write. Needed where an integer is divided through its reciprocal, or where a branch depends on
numbers that are known (`memory` in warp.py): rounding is the hardware's where it is one operation in double, else near it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .alu import Registers, effect
from .code import Instruction
from .values import (
    MASK,
    UNKNOWN,
    Operand,
    Value,
    combined,
    constant,
    from_double,
    from_float,
    joined,
    ordered,
    signed,
    split,
    to_double,
    where_known,
)


@effect("FADD", "FMUL", "FFMA")
def float_arithmetic(r: Registers, x: Instruction, to: list[Operand], of: list[Operand], lanes: Value) -> None:
    values, known = zip(*(r.single(arg) for arg in of if arg.kind not in ("P", "UP")), strict=True)
    a, *rest = (value.astype(np.float64) for value in values)
    result = a + rest[0] if x.base == "FADD" else a * rest[0] + (rest[1] if x.base == "FFMA" else 0)
    r.write(to[0], where_known(from_float(result), *known), lanes)


@effect("DADD", "DMUL", "DFMA")
def double_arithmetic(r: Registers, x: Instruction, to: list[Operand], of: list[Operand], lanes: Value) -> None:
    values, known = zip(*(r.double(arg) for arg in of), strict=True)
    a, *rest = values
    result = a + rest[0] if x.base == "DADD" else a * rest[0] + (rest[1] if x.base == "DFMA" else 0)
    for further, half in enumerate(from_double(result)):
        r.write(to[0], where_known(half, *known), lanes, further)


@effect("FSETP", "DSETP")
def float_compare(r: Registers, x: Instruction, to: list[Operand], of: list[Operand], lanes: Value) -> None:
    read = r.single if x.base == "FSETP" else r.double
    (a, known_a), (b, known_b) = read(of[0]), read(of[1])
    words = x.op.split(".")[1:]
    name, how = next(w for w in words if w not in ("FTZ", "BF")), next(w for w in words if w in ("AND", "OR", "XOR"))
    holds = where_known(ordered(name, a, b).astype(np.int64), known_a, known_b)
    other = r.predicate(of[2])
    r.write(to[0], combined(how, holds, other), lanes)
    r.write(to[1], combined(how, np.where(holds < 0, UNKNOWN, 1 - holds), other), lanes)


FUNCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "RCP": lambda v: 1 / v,
    "RSQ": lambda v: 1 / np.sqrt(v),
    "SQRT": np.sqrt,
    "EX2": np.exp2,
    "LG2": np.log2,
}


@effect("MUFU")
def special_function(r: Registers, x: Instruction, to: list[Operand], of: list[Operand], lanes: Value) -> None:
    name = x.op.split(".")[1]
    if name.endswith("64H"):  # of a double by its upper half, to an upper half
        bits = r.integer(of[0])
        value = to_double(constant(0), bits)
        result = from_double(1 / value if name == "RCP64H" else 1 / np.sqrt(value))[1]
        r.write(to[0], where_known(result, bits), lanes)
        return
    value, known = r.single(of[0])
    if name not in FUNCTIONS:
        r.write(to[0], np.full(32, UNKNOWN), lanes)
        return
    r.write(to[0], where_known(from_float(FUNCTIONS[name](value)), known), lanes)


@effect("FCHK")
def needs_slow_division(r: Registers, x: Instruction, to: list[Operand], of: list[Operand], lanes: Value) -> None:
    """Whether a quotient may leave the range of normal floats: the usual numbers do not."""
    r.write(to[0], constant(0), lanes)


@effect("I2F", "I2FP")
def to_floating(r: Registers, x: Instruction, to: list[Operand], of: list[Operand], lanes: Value) -> None:
    low = r.integer(of[0])
    unsigned = ".U32" in x.op or ".U64" in x.op
    if "64" in x.op.replace("F64", ""):
        high = r.raw(of[0], 1)
        value, known = np.array(joined(low, high, not unsigned), dtype=np.float64), np.minimum(low, high)
    else:
        value, known = (low if unsigned else signed(low)).astype(np.float64), low
    if ".F64" in x.op:
        for further, half in enumerate(from_double(value)):
            r.write(to[0], where_known(half, known), lanes, further)
        return
    single = value.astype(np.float32)
    if ".RP" in x.op:  # rounded up
        single = np.where(single < value, np.nextafter(single, np.float32(np.inf)), single)
    r.write(to[0], where_known(from_float(single), known), lanes)


@effect("F2I")
def to_integer(r: Registers, x: Instruction, to: list[Operand], of: list[Operand], lanes: Value) -> None:
    value, known = r.double(of[-1]) if ".F64" in x.op else r.single(of[-1])
    usable = np.where(np.isfinite(value) & (known >= 0), value, 0).astype(np.float64)
    numbers = [max(int(v), 0) if ".U" in x.op else int(v) for v in np.trunc(usable)]
    top = (1 << 64) - 1 if "64.TRUNC" in x.op else MASK
    halves_of = split([min(n, top) for n in numbers])
    for further in range(2 if "64.TRUNC" in x.op else 1):
        r.write(to[-1], where_known(halves_of[further], known), lanes, further)


@effect("F2F")
def between_floats(r: Registers, x: Instruction, to: list[Operand], of: list[Operand], lanes: Value) -> None:
    if ".F64.F32" in x.op:
        value, known = r.single(of[0])
        for further, half in enumerate(from_double(value.astype(np.float64))):
            r.write(to[0], where_known(half, known), lanes, further)
    elif ".F32.F64" in x.op:
        value, known = r.double(of[0])
        r.write(to[0], where_known(from_float(value), known), lanes)
    else:
        r.write(to[0], np.full(32, UNKNOWN), lanes)
