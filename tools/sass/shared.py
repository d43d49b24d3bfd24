"""A CTA's shared memory as far as a warp's way depends on it: whole numbers and addresses that its threads leave there.

Floats are not kept. They are made of what was loaded, of which nothing is known.
"""

from __future__ import annotations

import numpy as np

from .code import Instruction
from .registers import Registers, address, width
from .values import UNKNOWN, Operand, Value, operand

WINDOW = 0x7E00  # the upper half of a generic address that means shared memory; the system's choice
STORES = ("STS", "ST")
LOADS = ("LDS", "LD")
GLOBAL = frozenset(("LDG", "STG", "LD", "ST", "LDGSTS"))
FLOATS = frozenset("FADD FMUL FFMA FMNMX DADD DMUL DFMA MUFU F2F F2FP I2F I2FP HMMA HADD2".split())
COPIES = frozenset("MOV SEL FSEL PRMT SHFL".split())


class Shared:
    """Words by their address. The warps of one CTA have one of these."""

    def __init__(self) -> None:
        self.words: dict[int, int] = {}

    def load(self, place: int, size: int) -> int:
        word = self.words.get(place & ~3, UNKNOWN)
        return word >> 8 * (place & 3) & (1 << 8 * size) - 1 if word >= 0 else UNKNOWN

    def store(self, place: int, size: int, value: int) -> None:
        """Of less than a word the other bytes are left as they are, zeros where nobody has written."""
        if value < 0:
            self.words.pop(place & ~3, None)
            return
        shift, mask = 8 * (place & 3), (1 << 8 * size) - 1
        old = max(self.words.get(place & ~3, 0), 0)
        self.words[place & ~3] = old & ~(mask << shift) | (value & mask) << shift


class Provenance:
    """Which registers hold floats."""

    def __init__(self) -> None:
        self.floats: set[tuple[str, int]] = set()

    def note(self, x: Instruction, to: list[Operand], of: list[Operand]) -> None:
        copies = x.base in COPIES or ".MOV" in x.op
        is_float = x.base in FLOATS or (copies and any((one.kind, one.number) in self.floats for one in of))
        self.mark(to, width(x), is_float)

    def mark(self, to: list[Operand], words: int, is_float: bool) -> None:
        for one in to:
            if one.kind in ("R", "UR"):
                mine = {(one.kind, one.number + further) for further in range(words)}
                self.floats = self.floats | mine if is_float else self.floats - mine

    def of(self, x: Operand, further: int) -> bool:
        return (x.kind, x.number + further) in self.floats


def places(r: Registers, x: Instruction) -> Value:
    """The shared addresses that an instruction names in its lanes, UNKNOWN where it names none."""
    place = address(r, next((arg for arg in x.args if "[" in arg), ""))
    if x.base in ("LD", "ST"):
        return np.where(place >> 32 == WINDOW, place & 0xFFFFFFFF, UNKNOWN)
    return place


def sectors(r: Registers, x: Instruction, lanes: Value) -> tuple[int, int]:
    """Sectors of 32 bytes of global memory that an access's bytes would fill and that it touches; 0 where unknown."""
    named = [arg for arg in x.args if "[" in arg]
    place = address(r, named[-1]) if named else np.full(32, UNKNOWN)
    chosen = place[lanes & (place >> 32 != WINDOW)]
    if not len(chosen) or (chosen < 0).any():
        return 0, 0
    size = 16 if x.base == "LDGSTS" else bytes_of(x) * width(x)
    touched = {int(at) + further >> 5 for at in set(chosen) for further in range(0, size, 4)}
    return -(-size * len(set(chosen)) // 32), len(touched)


def bytes_of(x: Instruction) -> int:
    """Of a word of what it moves."""
    return 1 if ".U8" in x.op or ".S8" in x.op else 2 if ".U16" in x.op or ".S16" in x.op else 4


def store(shared: Shared, r: Registers, known: Provenance, x: Instruction, lanes: Value) -> None:
    place, what = places(r, x), operand(x.args[-1])
    if what is None:
        return
    for further in range(width(x)):
        value = r.raw(what, further)
        if known.of(what, further):
            value = np.full(32, UNKNOWN)
        for lane in np.flatnonzero(lanes & (place >= 0)):
            shared.store(int(place[lane]) + 4 * further, bytes_of(x), int(value[lane]))


def load(shared: Shared, r: Registers, x: Instruction, lanes: Value) -> list[Value]:
    """What is known of each word of a load."""
    place, found = places(r, x), []
    for further in range(width(x)):
        value = np.full(32, UNKNOWN, dtype=np.int64)
        for lane in np.flatnonzero(lanes & (place >= 0)):
            value[lane] = shared.load(int(place[lane]) + 4 * further, bytes_of(x))
        found.append(value)
    return found
