"""What instructions on integers and predicates write, and moves: one function an opcode (floats.py has more).

An opcode that is not here leaves its results unknown, which does no harm until a branch depends on it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .code import Instruction
from .registers import Registers, sides, width
from .values import (
    COMPARE,
    LANES,
    MASK,
    UNKNOWN,
    Operand,
    Value,
    combined,
    constant,
    joined,
    lut_of_known,
    permuted,
    signed,
    split,
    where_known,
)

NONE = np.zeros(32, dtype=np.int64)
LOWER, UPPER = np.uint64(MASK), np.uint64(32)
Effect = Callable[[Registers, Instruction, list[Operand], list[Operand], Value], None]
EFFECTS: dict[str, Effect] = {}


def effect(*names: str) -> Callable[[Effect], Effect]:
    def keep(function: Effect) -> Effect:
        EFFECTS.update(dict.fromkeys(names, function))
        return function

    return keep


def apply(registers: Registers, x: Instruction, lanes: Value) -> None:
    """Writes what an instruction writes, in the lanes where it runs."""
    to, of = sides(x)
    known = EFFECTS.get(x.base) or EFFECTS.get(x.base.removeprefix("U"))
    if known is not None:
        known(registers, x, to, of, lanes)
        return
    for one in to:
        if one.kind in registers.file and x.args[0][0] in "RUP":
            for further in range(width(x)):
                registers.write(one, np.full(32, UNKNOWN), lanes, further)


# ---- moves ----------------------------------------------------------------------------------------------------------


@effect("MOV", "R2UR")
def move(r: Registers, x: Instruction, to: list[Operand], of: list[Operand], lanes: Value) -> None:
    value = r.integer(of[-1 if x.base == "R2UR" else 0])
    if x.base == "R2UR" and lanes.any():
        own, value = value, np.full(32, value[np.flatnonzero(lanes)[0]])
        if len(to) > 1:  # which lanes have another one, and take their turns later
            others = where_known((own != value).astype(np.int64), own, value)
            r.write(to[0], combined("OR", others, r.predicate(to[0])) if ".OR" in x.op else others, lanes)
    r.write(to[-1], value, lanes)


@effect("CS2R")
def clear(r: Registers, x: Instruction, to: list[Operand], of: list[Operand], lanes: Value) -> None:
    value = constant(0) if x.args[-1] == "SRZ" else np.full(32, UNKNOWN)
    for further in range(1 if ".32" in x.op else 2):
        r.write(to[0], value, lanes, further)


@effect("S2R", "S2UR")
def special(r: Registers, x: Instruction, to: list[Operand], of: list[Operand], lanes: Value) -> None:
    r.write(to[0], r.special.get(x.args[-1], np.full(32, UNKNOWN)), lanes)


@effect("LDC", "ULDC", "LDCU")
def from_constants(r: Registers, x: Instruction, to: list[Operand], of: list[Operand], lanes: Value) -> None:
    values = [r.raw(of[0], further) for further in range(width(x))]  # all before the first may overwrite the address
    for further, value in enumerate(values):
        if ".U8" in x.op or ".U16" in x.op:
            value = where_known(value & (255 if ".U8" in x.op else 65535), value)
        r.write(to[0], value, lanes, further)


@effect("HFMA2")
def halves(r: Registers, x: Instruction, to: list[Operand], of: list[Operand], lanes: Value) -> None:
    """-RZ, RZ, a, b: how the compiler writes a number that looks like two halves."""
    value = np.full(32, UNKNOWN)
    if of[0].is_zero and of[1].is_zero and len(of) == 4:
        high, low = (np.float16(part.decimal or 0).view(np.uint16) for part in of[2:])
        value = constant(int(high) << 16 | int(low))
    r.write(to[0], value, lanes)


@effect("SEL", "FSEL")
def select(r: Registers, x: Instruction, to: list[Operand], of: list[Operand], lanes: Value) -> None:
    a, b, p = r.integer(of[0]), r.integer(of[1]), r.predicate(of[2])
    r.write(to[0], np.where(p < 0, np.where(a == b, a, UNKNOWN), np.where(p > 0, a, b)), lanes)


@effect("PRMT")
def permute(r: Registers, x: Instruction, to: list[Operand], of: list[Operand], lanes: Value) -> None:
    a, selector, b = (r.integer(arg) for arg in of)
    r.write(to[0], where_known(permuted(a, selector, b), a, selector, b), lanes)


@effect("SHFL")
def shuffle(r: Registers, x: Instruction, to: list[Operand], of: list[Operand], lanes: Value) -> None:
    value, b, c = (r.integer(arg) for arg in of)
    b = b & 31
    source = {"IDX": b, "BFLY": LANES ^ b, "UP": LANES - b, "DOWN": LANES + b}[x.op.split(".")[1]]
    inside = (source >= 0) & (source < 32)
    r.write(to[-1], np.where((b < 0) | (c < 0), UNKNOWN, value[np.where(inside, source, LANES)]), lanes)
    r.write(to[0], inside.astype(np.int64), lanes) if len(to) > 1 else None


@effect("VOTE", "VOTEU")
def vote(r: Registers, x: Instruction, to: list[Operand], of: list[Operand], lanes: Value) -> None:
    p = r.predicate(of[-1])[lanes.astype(bool)]
    bad = bool((p < 0).any())
    mask = sum(1 << int(lane) for lane, bit in zip(np.flatnonzero(lanes), p, strict=True) if bit > 0)
    holds = bool((p > 0).all()) if ".ALL" in x.op else bool((p > 0).any())
    for one in to:
        value = UNKNOWN if bad else mask if one.kind in ("R", "UR") else int(holds)
        r.write(one, np.full(32, value), lanes)


@effect("P2R")
def pack_predicates(r: Registers, x: Instruction, to: list[Operand], of: list[Operand], lanes: Value) -> None:
    kept, mask = r.integer(of[-2]), r.integer(of[-1])
    chosen = [i for i in range(7) if int(mask[0]) >> i & 1]
    bits = sum((np.maximum(r.file["P"][i], 0) << i for i in chosen), start=np.zeros(32, dtype=np.int64))
    bad = np.any([r.file["P"][i] < 0 for i in chosen], axis=0) if chosen else np.zeros(32, dtype=bool)
    r.write(to[0], np.where(bad, UNKNOWN, where_known(kept & ~mask | bits, kept, mask)), lanes)


@effect("R2P")
def unpack_predicates(r: Registers, x: Instruction, to: list[Operand], of: list[Operand], lanes: Value) -> None:
    value, mask = (r.integer(arg) for arg in [*to, *of][-2:])
    for i in range(7):
        if int(mask[0]) >> i & 1:
            r.write(Operand("P", i), np.where(value < 0, UNKNOWN, value >> i & 1), lanes)


# ---- integers -------------------------------------------------------------------------------------------------------


def addends(r: Registers, of: list[Operand]) -> tuple[list[Value], Value]:
    """Numbers to add whose sum's carry is right, -x being 2^32 - x; and where they are known."""
    values = [r.integer(arg) for arg in of]
    raw = [np.where(v == 0, 1 << 32, v) if arg.negative else v for v, arg in zip(values, of, strict=True)]
    bad = np.any([v < 0 for v in values], axis=0)
    return raw, bad


@effect("IADD3")
def add(r: Registers, x: Instruction, to: list[Operand], of: list[Operand], lanes: Value) -> None:
    numbers = [arg for arg in of if arg.kind not in ("P", "UP")]
    values, bad = addends(r, numbers)
    for arg in of:
        if arg.kind in ("P", "UP"):
            carry = r.predicate(arg)
            values, bad = [*values, carry], bad | (carry < 0)
    total = sum(values, start=np.zeros(32, dtype=np.int64))
    r.write(to[0], np.where(bad, UNKNOWN, total & MASK), lanes)
    for count, flag in enumerate(to[1:], 1):
        r.write(flag, np.where(bad, UNKNOWN, (total >> 32 >= count).astype(np.int64)), lanes)


@effect("VIADD")
def add_two(r: Registers, x: Instruction, to: list[Operand], of: list[Operand], lanes: Value) -> None:
    a, b = r.integer(of[0]), r.integer(of[1])
    r.write(to[0], where_known(a + b, a, b), lanes)


@effect("IMAD")
def multiply_add(r: Registers, x: Instruction, to: list[Operand], of: list[Operand], lanes: Value) -> None:
    a, b, c = r.integer(of[0]), r.integer(of[1]), r.integer(of[2])
    unsigned = ".U32" in x.op
    carries = [r.predicate(arg) for arg in of[3:] if arg.kind in ("P", "UP")]
    if ".WIDE" not in x.op and ".HI" not in x.op:
        # A factor of zero makes nothing of an unknown one.
        nothing = np.where((a == 0) | (b == 0), 0, np.where((a < 0) | (b < 0), UNKNOWN, (a * b) & MASK))
        r.write(to[0], where_known(nothing + c + sum(carries), nothing, c, *carries), lanes)
        return
    high = r.raw(of[2], 1)
    if of[2].negative or of[2].inverted:
        high = np.full(32, UNKNOWN)
    times = (a * b if unsigned else signed(a) * signed(b)).astype(np.uint64)
    plus = ((high & MASK) << 32 | (c & MASK)).astype(np.uint64) + sum(carries, start=NONE).astype(np.uint64)
    total = times + plus  # modulo 2^64
    low, top = (where_known(half.astype(np.int64), a, b, c, high, *carries) for half in (total & LOWER, total >> UPPER))
    if ".HI" in x.op:
        r.write(to[0], top, lanes)
        return
    r.write(to[0], low, lanes)
    r.write(to[0], top, lanes, 1)
    for flag in to[1:]:
        r.write(flag, np.where(low < 0, UNKNOWN, (total < times).astype(np.int64)), lanes)


@effect("LEA")
def scale_add(r: Registers, x: Instruction, to: list[Operand], of: list[Operand], lanes: Value) -> None:
    carry = r.predicate(of[-1]) if of[-1].kind in ("P", "UP") else np.zeros(32, dtype=np.int64)
    numbers = [arg for arg in of if arg.kind not in ("P", "UP")]
    a, b, shift = r.integer(numbers[0]), numbers[1], int(r.integer(numbers[-1])[0])
    if ".HI" in x.op:
        if ".SX32" in x.op:
            top = where_known(np.where(a >> 31 & 1, MASK, 0), a)
        else:
            top = r.integer(numbers[2])
        over = split([n << shift for n in joined(a, top)])[1]
        other = r.integer(b)
        total = over + other + carry
        r.write(to[0], where_known(total, a, top, other, carry), lanes)
        for flag in to[1:]:
            r.write(flag, where_known(total >> 32 & 1, a, top, other, carry), lanes)
        return
    (other,), bad = addends(r, [b])
    scaled = where_known(a << shift, a)
    if numbers[0].negative:  # -a shifted: its carry is that of the sum of 2^32 - x
        scaled = np.where(scaled == 0, 1 << 32, scaled)
    total = scaled + other + carry
    bad = bad | (a < 0) | (carry < 0)
    r.write(to[0], np.where(bad, UNKNOWN, total & MASK), lanes)
    for flag in to[1:]:
        r.write(flag, np.where(bad, UNKNOWN, total >> 32 & 1), lanes)


@effect("SHF")
def shift(r: Registers, x: Instruction, to: list[Operand], of: list[Operand], lanes: Value) -> None:
    low, by, high = (r.integer(arg) for arg in of)
    wide, is_signed = "64" in x.op, ".S32" in x.op or ".S64" in x.op
    limit = 63 if wide else 31 if ".W" in x.op else 32
    amount = by & 63 if ".W" in x.op and wide else by & 31 if ".W" in x.op else np.clip(by, 0, limit)
    numbers = joined(low, high, is_signed)
    steps = [int(n) for n in amount]
    if ".L" in x.op:
        moved = [n << s for n, s in zip(numbers, steps, strict=True)]
    else:
        moved = [n >> s for n, s in zip(numbers, steps, strict=True)]
    half = split(moved)[1 if ".HI" in x.op else 0]
    r.write(to[0], where_known(half, low, by, high), lanes)


@effect("LOP3")
def logic(r: Registers, x: Instruction, to: list[Operand], of: list[Operand], lanes: Value) -> None:
    a, b, c, table = (r.integer(arg) for arg in of[:4])
    value = lut_of_known(int(table[0]), a, b, c)
    flag = of[1].kind == "number" and int(MASK ^ b[0]).bit_count() == 1
    if flag and int(table[0]) == 0xC0 and (to[-1].kind, to[-1].number) == (of[0].kind, of[0].number):
        value = np.where(value < 0, 0, value)  # one of several flags in a register; what it held before is nobody's
    r.write(to[-1], value, lanes)
    if len(to) > 1:
        r.write(to[0], np.where(value < 0, UNKNOWN, (value != 0).astype(np.int64)), lanes)


@effect("PLOP3")
def predicate_logic(r: Registers, x: Instruction, to: list[Operand], of: list[Operand], lanes: Value) -> None:
    inputs = [r.predicate(arg) for arg in of if arg.kind in ("P", "UP")]
    tables = [arg.number for arg in of if arg.kind == "number"]
    full = [np.where(p < 0, UNKNOWN, np.where(p > 0, MASK, 0)) for p in inputs]
    for flag, table in zip(to, tables, strict=False):
        value = lut_of_known(table, *full)
        r.write(flag, np.where(value < 0, UNKNOWN, value & 1), lanes)


@effect("ISETP")
def compare(r: Registers, x: Instruction, to: list[Operand], of: list[Operand], lanes: Value) -> None:
    a, b = r.integer(of[0]), r.integer(of[1])
    name, how = x.op.split(".")[1], "AND" if ".AND" in x.op else "OR" if ".OR" in x.op else "XOR"
    left, right = (a, b) if ".U32" in x.op else (signed(a), signed(b))
    holds = COMPARE[name](left, right).astype(np.int64)
    if ".EX" in x.op:  # the upper halves; the lower ones decide where they are equal
        holds = np.where(a == b, r.predicate(of[3]), holds)
    holds = np.where((a < 0) | (b < 0), UNKNOWN, holds)
    with_other = r.predicate(of[2])
    r.write(to[0], combined(how, holds, with_other), lanes)
    r.write(to[1], combined(how, np.where(holds < 0, UNKNOWN, 1 - holds), with_other), lanes)


@effect("VIMNMX", "IMNMX")
def least_or_most(r: Registers, x: Instruction, to: list[Operand], of: list[Operand], lanes: Value) -> None:
    a, b, p = r.integer(of[0]), r.integer(of[1]), r.predicate(of[2])
    smaller = a < b if ".U32" in x.op else signed(a) < signed(b)
    r.write(to[0], where_known(np.where(smaller == (p > 0), a, b), a, b, p), lanes)


@effect("VIADDMNMX")
def add_least_or_most(r: Registers, x: Instruction, to: list[Operand], of: list[Operand], lanes: Value) -> None:
    a, b, c, p = *(r.integer(arg) for arg in of[:3]), r.predicate(of[3])
    total = a + b & MASK
    smaller = total < c if ".U32" in x.op else signed(total) < signed(c)
    r.write(to[0], where_known(np.where(smaller == (p > 0), total, c), a, b, c, p), lanes)


@effect("IABS")
def magnitude(r: Registers, x: Instruction, to: list[Operand], of: list[Operand], lanes: Value) -> None:
    a = r.integer(of[0])
    r.write(to[0], where_known(np.abs(signed(a)), a), lanes)


@effect("POPC", "FLO", "BREV")
def bits(r: Registers, x: Instruction, to: list[Operand], of: list[Operand], lanes: Value) -> None:
    def of_one(n: int) -> int:
        if x.base == "BREV":
            return int(f"{n:032b}"[::-1], 2)
        return bin(n).count("1") if x.base == "POPC" else n.bit_length() - 1 & MASK

    a = r.integer(of[0])
    r.write(to[-1], where_known(np.array([of_one(int(n)) for n in np.maximum(a, 0)]), a), lanes)
