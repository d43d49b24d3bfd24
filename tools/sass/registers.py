"""A warp's registers: how an instruction's operands are read, and which of them it writes."""

from __future__ import annotations

from functools import cache

import numpy as np

from .code import Instruction
from .values import (
    ADDRESS,
    ALL,
    LANES,
    UNKNOWN,
    ZERO,
    Operand,
    Value,
    constant,
    from_float,
    operand,
    signed,
    to_double,
    to_float,
    where_known,
)

TWO_PREDICATES = {"ISETP", "UISETP", "FSETP", "DSETP", "PLOP3", "UPLOP3", "HSETP2"}
PREDICATE_FIRST = {"LOP3", "ULOP3", "SHFL", "VOTE", "VOTEU", "F2I", "LDG", "LDS", "R2UR", "ATOMG", "ATOMS"}
CARRIES = {"IADD3", "UIADD3", "IMAD", "UIMAD", "LEA", "ULEA", "VIADD"}


class Registers:
    """A warp's registers and predicates, the uniform ones in every lane alike, and the constants of its kernel."""

    def __init__(self, banks: dict[int, bytes]):
        self.banks = banks
        # Nothing depends on what nobody has written; but flags kept in one register are set bit by bit.
        self.file = {
            "R": np.zeros((256, 32), dtype=np.int64),
            "UR": np.zeros((256, 32), dtype=np.int64),
            "P": np.zeros((8, 32), dtype=np.int64),
            "UP": np.zeros((8, 32), dtype=np.int64),
        }
        self.file["P"][7] = self.file["UP"][7] = 1
        self.special: dict[str, Value] = {}

    def raw(self, x: Operand, further: int = 0) -> Value:
        """The register or word itself; `further`: the one so many behind it, of a wide operand."""
        if x.kind in ("R", "UR"):
            return self.file[x.kind][x.number if x.is_zero else x.number + further]
        if x.kind == "c":
            base = self.file["UR" if x.base[0] == "U" else "R"][register(x.base)] if x.base else constant(0)
            return self.word(x.bank, base + x.number + 4 * further, base < 0)
        if x.kind == "number":
            return constant(x.number if further == 0 else 0)
        return self.file[x.kind][x.number]

    def word(self, bank: int, at: Value, bad: Value) -> Value:
        image = self.banks.get(bank, b"")
        out = np.full(32, UNKNOWN, dtype=np.int64)
        if not bad.any() and (at == at[0]).all():
            place = int(at[0])
            inside = 0 <= place <= len(image) - 4
            return np.full(32, int.from_bytes(image[place : place + 4], "little")) if inside else out
        for lane in LANES:
            place = int(at[lane])
            if not bad[lane] and 0 <= place <= len(image) - 4:
                out[lane] = int.from_bytes(image[place : place + 4], "little")
        return out

    def integer(self, x: Operand) -> Value:
        value = self.raw(x)
        if x.part and x.part != "64":
            value = part_of(value, x.part)
        if x.absolute:
            value = where_known(np.abs(signed(value)), value)
        if x.inverted:
            value = where_known(~value, value)
        return where_known(-value, value) if x.negative else value

    def predicate(self, x: Operand) -> Value:
        value = self.file[x.kind][x.number]
        return np.where(value < 0, UNKNOWN, 1 - value) if x.inverted else value

    def single(self, x: Operand) -> tuple[np.ndarray, Value]:
        """A float and where it is known, the latter as bits."""
        bits = self.raw(x) if x.decimal is None else from_float(np.full(32, x.decimal))
        value = to_float(bits)
        if x.absolute:
            value = np.abs(value)
        return (-value if x.negative and x.decimal is None else value), bits

    def double(self, x: Operand) -> tuple[np.ndarray, Value]:
        if x.decimal is not None:
            return np.full(32, x.decimal), constant(0)
        low, high = (constant(0), self.raw(x)) if x.kind == "number" else (self.raw(x), self.raw(x, 1))
        value = to_double(low, high)
        if x.absolute:
            value = np.abs(value)
        return (-value if x.negative else value), np.minimum(low, high)

    def write(self, x: Operand | None, value: Value, lanes: Value, further: int = 0) -> None:
        if x is None or x.kind not in self.file:
            return
        zero = ZERO[x.kind]
        if x.number != zero and x.number + further < zero:
            row = self.file[x.kind][x.number + further]
            if lanes is ALL or x.kind[0] == "U":
                row[:] = value
            else:
                np.copyto(row, value, where=lanes.astype(bool))


def register(name: str) -> int:
    digits = name.lstrip("UR")
    return 255 if digits == "Z" else int(digits)


def part_of(value: Value, part: str) -> Value:
    shift, bits = {"B0": (0, 8), "B1": (8, 8), "B2": (16, 8), "B3": (24, 8), "H0": (0, 16), "H1": (16, 16)}.get(
        part.split("_")[0], (0, 32)
    )
    return where_known(value >> shift & (1 << bits) - 1, value)


def sides(x: Instruction) -> tuple[list[Operand], list[Operand]]:
    """(destinations, sources): the first operand, and predicates right behind it or before a register that is written."""
    return split_sides(x.base, x.args)


@cache
def split_sides(base: str, args: tuple[str, ...]) -> tuple[list[Operand], list[Operand]]:
    found = [arg for arg in map(operand, args) if arg is not None]
    cut = 1
    if found and found[0].kind in ("P", "UP") and len(found) > 1:  # P0, R5, ... or P0, PT, ...
        cut = 2 if base in TWO_PREDICATES or (found[1].kind in ("R", "UR") and base in PREDICATE_FIRST) else 1
    elif base in CARRIES:
        while cut < len(found) and found[cut].kind in ("P", "UP"):
            cut += 1
    return found[:cut], found[cut:]


def width(x: Instruction) -> int:
    """Registers that a result takes."""
    if x.base == "HMMA" or x.op.endswith(("128", ".M88.4", ".MT88.4")):
        return 4
    wide = (
        x.base.startswith("D")
        or x.op == "CS2R"
        or any(f".{mark}" in x.op for mark in ("64", "WIDE", "M88.2", "MT88.2", "F64.", "S64"))
    )
    return 2 if wide else 1


def address(r: Registers, text: str) -> Value:
    """The address in an instruction's [..], UNKNOWN where a part of it is."""
    match = ADDRESS.match(text)
    total, known = constant(0), constant(0)
    for term in match[1].split("+") if match else []:
        wide = term.endswith(".64") or ".64" in term
        scale = int(term.rsplit(".X", 1)[1]) if ".X" in term else 1
        x = operand(term.split(".")[0])
        if x is None:
            return np.full(32, UNKNOWN)
        low = r.integer(x) if x.kind != "number" else np.full(32, -x.number if x.negative else x.number)
        if x.kind != "number":
            known = np.minimum(known, low)
        total = total + scale * low
        if wide or (x.kind == "R" and "desc" in text and ".U32" not in term):
            high = r.raw(x, 1)
            known, total = np.minimum(known, high), total + (high << 32)
    return np.where(known < 0, UNKNOWN, total)
