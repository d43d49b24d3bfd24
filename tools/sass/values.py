"""What instructions do to a warp's registers: integers and predicates exactly, floats where their operands are known.

A value is 32 lanes of int64: 0 to 2^32 - 1, or UNKNOWN, of which everything that is made of it is UNKNOWN, too. What a
kernel loads from memory is unknown; where it goes next does not depend on that, but for a list of rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

LANES = np.arange(32)
ALL = np.ones(32, dtype=bool)  # compared by identity where it saves time: never written to
MASK = (1 << 32) - 1
UNKNOWN = -1
Value = np.ndarray
REGISTER = re.compile(r"^(U?R|U?P)(\d+|Z|T)(?:\.(.*))?$")
CONSTANT = re.compile(r"^c\[(0x[0-9a-f]+)\]\s*\[(?:(U?R\d+|U?RZ)\+?)?(-?0x[0-9a-f]+)?\]$")
ADDRESS = re.compile(r"^(?:desc\[\w+\])?\[(.*)\]$")


def constant(number: int) -> Value:
    return np.full(32, number & MASK, dtype=np.int64)


def where_known(result: Value, *operands: Value) -> Value:
    """The result's low 32 bits in the lanes where no operand is unknown."""
    signs = operands[0]
    for other in operands[1:]:
        signs = signs | other  # negative where one of them is
    return np.where(signs < 0, UNKNOWN, result & MASK)


def signed(x: Value) -> Value:
    return np.where(x >= 1 << 31, x - (1 << 32), x)


@dataclass(frozen=True)
class Operand:
    """One operand of an instruction as its text has it."""

    kind: str  # R, UR, P, UP, c or number
    number: int = 0  # of a register; a number's value
    bank: int = 0
    base: str = ""  # the register in a constant's address
    negative: bool = False
    inverted: bool = False  # bits of a number, or a predicate
    absolute: bool = False
    part: str = ""  # H0_H0, B1, ...
    decimal: float | None = None  # a float written out

    @property
    def is_zero(self) -> bool:
        return self.kind in ("R", "UR") and self.number == ZERO[self.kind]


ZERO = {"R": 255, "UR": 255, "P": 7, "UP": 7}
FLOATS = {"+INF": np.inf, "INF": np.inf, "+QNAN": np.nan, "QNAN": np.nan, "+SNAN": np.nan, "SNAN": np.nan}


@cache
def operand(text: str) -> Operand | None:
    """None for what is no value: an address, a label, a special register."""
    marks = text[: len(text) - len(text.lstrip("-~!|"))]
    rest = text.lstrip("-~!|").replace("|", "")
    negative, inverted, absolute = "-" in marks, "~" in marks or "!" in marks, "|" in marks
    if match := REGISTER.match(rest):
        number = ZERO[match[1]] if match[2] in "ZT" else int(match[2])
        return Operand(match[1], number, 0, "", negative, inverted, absolute, match[3] or "")
    if match := CONSTANT.match(rest):
        number = int(match[3] or "0", 16)
        return Operand("c", number, int(match[1], 16), match[2] or "", negative, inverted, absolute)
    if re.fullmatch(r"0x[0-9a-f]+", rest):
        return Operand("number", int(rest, 16), 0, "", negative, inverted, absolute)
    if rest in FLOATS or re.fullmatch(r"[+-]?\d+(\.\d+)?(e[+-]?\d+)?", rest):
        value = FLOATS[rest] if rest in FLOATS else float(rest)
        return Operand("number", 0, decimal=-value if negative else value)
    return None


# ---- floats ---------------------------------------------------------------------------------------------------------


def to_float(bits: Value) -> np.ndarray:
    return (bits & MASK).astype(np.uint32).view(np.float32)


def from_float(x: np.ndarray) -> Value:
    return np.asarray(x, dtype=np.float32).view(np.uint32).astype(np.int64)


def to_double(low: Value, high: Value) -> np.ndarray:
    return ((high & MASK).astype(np.uint64) << np.uint64(32) | (low & MASK).astype(np.uint64)).view(np.float64)


def from_double(x: np.ndarray) -> tuple[Value, Value]:
    bits = np.asarray(x, dtype=np.float64).view(np.uint64)
    return (bits & np.uint64(MASK)).astype(np.int64), (bits >> np.uint64(32)).astype(np.int64)


# ---- integers -------------------------------------------------------------------------------------------------------


def lut(table: int, a: Value, b: Value, c: Value) -> Value:
    out = np.zeros(32, dtype=np.int64)
    for i in range(8):
        if table >> i & 1:
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out & MASK


def lut_of_known(table: int, a: Value, b: Value, c: Value) -> Value:
    """lut, known also where the table does not look at what is unknown or a zero or all ones decide."""
    result = lut(table, a, b, c)
    bad = np.zeros(32, dtype=bool)
    for which in (a, b, c):
        if not (which < 0).any():
            continue
        zeros, ones = constant(0), constant(MASK)
        low = lut(table, *(zeros if x is which else x for x in (a, b, c)))
        high = lut(table, *(ones if x is which else x for x in (a, b, c)))
        bad |= (which < 0) & (low != high)
    return np.where(bad, UNKNOWN, result)


def split(numbers: list[int]) -> tuple[Value, Value]:
    low = np.array([n & MASK for n in numbers], dtype=np.int64)
    return low, np.array([n >> 32 & MASK for n in numbers], dtype=np.int64)


def joined(low: Value, high: Value, is_signed: bool = False) -> list[int]:
    top = signed(high) if is_signed else high
    return [int(h) << 32 | int(n) for n, h in zip(low, top, strict=True)]


def permuted(a: Value, selector: Value, b: Value) -> Value:
    """PRMT: each nibble of the selector chooses one of the eight bytes of b:a, or its sign."""
    out = np.zeros(32, dtype=np.int64)
    for i in range(4):
        nibble = selector >> 4 * i & 15
        source = np.where(nibble & 4, b, a)
        byte = source >> 8 * (nibble & 3) & 255
        out |= np.where(nibble & 8, np.where(byte & 128, 255, 0), byte) << 8 * i
    return out


COMPARE: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "LT": np.less,
    "LE": np.less_equal,
    "GT": np.greater,
    "GE": np.greater_equal,
    "EQ": np.equal,
    "NE": np.not_equal,
}


def ordered(name: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """A comparison of floats: with U behind its name, true of NaN, too."""
    if name in ("NUM", "NAN"):
        nan = np.isnan(a) | np.isnan(b)
        return nan if name == "NAN" else ~nan
    name = {"MAX": "GT", "MIN": "LT"}.get(name, name)  # which of two a maximum takes
    plain = COMPARE[name.removesuffix("U")](a, b)
    nan = np.isnan(a) | np.isnan(b)
    return plain | nan if name.endswith("U") else plain & ~nan


def combined(name: str, a: Value, b: Value) -> Value:
    """Predicates, UNKNOWN among them: an AND with a false is false, an OR with a true is true."""
    if name == "AND":
        return np.where((a == 0) | (b == 0), 0, np.where((a < 0) | (b < 0), UNKNOWN, 1))
    if name == "OR":
        return np.where((a == 1) | (b == 1), 1, np.where((a < 0) | (b < 0), UNKNOWN, 0))
    return np.where((a < 0) | (b < 0), UNKNOWN, a ^ b)
