"""What one tile costs: a launch with a few tiles a CTA walked to its end, and one with some more; the difference is theirs.

So it does not matter how a kernel's loops are cut, unrolled or overlapped; what comes before and after them is in neither.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .calls import Call, Device, Launch, launches
from .code import Instruction, Kernel
from .shared import WINDOW, Shared
from .values import MASK, UNKNOWN, Value, from_double, from_float
from .warp import Latency, Trace, Undecided, Warp

FEW, MORE = 4, 6  # tiles a CTA: enough for all stages of the pipe
PIECES = 4  # that are enough, too
BARRIERS = ("BAR", "UCGABAR_WAIT")


@dataclass(frozen=True)
class Cost:
    """What each of some warps of a CTA does, for a tile or besides."""

    instructions: tuple[float, ...]  # a warp
    cycles: tuple[float, ...]  # likewise, no wait taking any
    behind: tuple[float, ...]  # of these, from the warp's first wait for arrivals on
    critical: float  # cycles of the slowest warp from barrier to barrier, added up
    counts: Counter[str]  # the first warp's instructions, by opcode with modifiers
    aside: float = 0.0  # cycles of the first warp's own work between what it first sends and its next wait


@dataclass(frozen=True)
class Costs:
    tile: Cost  # of one tile; nothing where a launch has none
    rest: Cost  # of all else
    whole: tuple[Trace, ...]  # a walk of each of the warps, a few tiles long


def within(place: Value, start: int) -> Value:
    """Which addresses are in the 4 GB that begin there."""
    return (place >= start) & (place < start + (1 << 32))


def memory_of(launch: Launch) -> Callable[[Instruction, Value, int], Value]:
    """What a launch finds in memory as far as its way depends on it: distinct rows in the list, an adapter a row, their
    table (of linear edits), orthonormal rows where a matrix of them is factored, and ones."""
    line = np.array([0, launch.r, 0, 1])  # first vector, rank, activation, form
    one, nothing = from_double(np.ones(32)), from_double(np.zeros(32))
    # A step's sums S (r, r) are the first of so many pairs at the end of its shared memory, as policy_retract.h has it.
    pairs = (launch.r**2 + 1) // 2
    behind = 16 * (2 * pairs + (pairs + 8 if launch.cluster > 1 else 0))
    sums = launch.reserved + launch.shared - behind

    def read(x: Instruction, place: Value, further: int) -> Value:
        if launch.tiles.count:  # where these go, numbers do not decide
            other = np.full(32, UNKNOWN)
        elif x.base == "LDS" and (".64" in x.op or ".128" in x.op):  # sums in double
            other = one[further % 2]
        else:
            other = from_float(np.ones(32))
        if launch.kernel.startswith("step_kernel"):
            at = np.where(place >> 32 == WINDOW, place & MASK, place) - sums
            entry = at // 8 + further // 2
            diagonal = np.where(entry % (launch.r + 1) == 0, one[further % 2], nothing[further % 2])
            other = np.where((at >= 0) & (entry < launch.r**2), diagonal, other)
        if launch.table:
            at = (place - launch.table) // 4 + further
            other = np.where(
                within(place, launch.table), np.where(at % 4 == 0, at // 4 * launch.r, line[at % 4]), other
            )
            number = (place - launch.adapter) // 8 if further % 2 == 0 else 0
            other = np.where(within(place, launch.adapter), number, other)
        if not launch.index:
            return other
        row = (place - launch.index) // 8 * 7
        return np.where(within(place, launch.index), row if further % 2 == 0 else 0, other)

    return read


SPIN = 8 * 16  # bytes of code of a wait that asks again and again, as cc 8.x has for an mbarrier


def over(x: Instruction) -> bool:
    """Of a branch that depends on something unknown: a wait is over, and all else is not known."""
    if x.targets and 0 < x.pc - x.targets[0] <= SPIN:
        return False
    raise Undecided(f"where does this go? {x}")


def walked(
    kernel: Kernel, launch: Launch, latency: Latency, warps: tuple[int, ...] = (0,), cta: int = 0
) -> list[Trace]:
    memory, shared = memory_of(launch), Shared()  # the first warp leaves there what the others find
    return [Warp(kernel, launch, latency, warp, (cta, 0), shared, memory, over).run() for warp in warps]


def segments(trace: Trace, waits: bool) -> list[float]:
    """Cycles from each barrier to the next, or to the next wait for arrivals."""
    cuts = [0.0]
    for step in trace.steps:
        x = trace.kernel.code[step.index]
        if x.base in BARRIERS or (waits and "TRYWAIT" in x.op):
            cuts.append(step.time)
    return [b - a for a, b in zip(cuts, [*cuts[1:], trace.end], strict=True)]


def behind_first_wait(trace: Trace) -> float:
    """Cycles from a warp's first wait for arrivals on; 0 where it has none."""
    waits = (step.time for step in trace.steps if "TRYWAIT" in trace.kernel.code[step.index].op)
    return trace.end - next(waits, trace.end)


def aside(trace: Trace) -> float:
    """Cycles from the last of what a warp first sends to other CTAs to its next wait for arrivals."""
    sent = 0.0
    for step in trace.steps:
        x = trace.kernel.code[step.index]
        if x.base == "STAS":
            sent = step.time
        elif sent and "TRYWAIT" in x.op:
            return step.time - sent
    return 0.0


def critical(traces: list[Trace]) -> float:
    """Cycles of the slowest warp between barriers, where all meet the same ones; else of the slowest of those that do."""
    together: dict[int, list[list[float]]] = {}
    for waits in (True, False):
        together.clear()
        for part in (segments(trace, waits) for trace in traces):
            together.setdefault(len(part), []).append(part)
        if len(together) == 1:
            break
    return max(sum(map(max, zip(*parts, strict=True))) for parts in together.values())


def with_tiles(program: Path, call: Call, device: Device, which: int, each: int) -> Launch:
    """The call's `which`-th launch for so many rows that every CTA has `each` tiles."""
    full = launches(program, call, device)[which]
    n = full.tiles.groups * full.tiles.rows * each
    launch = launches(program, replace(call, n=n, total=0), device)[which]
    if (launch.kernel, launch.grid, launch.tiles.bytes) != (full.kernel, full.grid, full.tiles.bytes):
        raise ValueError(f"{call} with n = {n} is another plan: {launch}, not {full}")
    return launch


def cost_of(traces: list[Trace]) -> Cost:
    instructions = tuple(float(len(trace.steps)) for trace in traces)
    ends, behind = tuple(trace.end for trace in traces), tuple(map(behind_first_wait, traces))
    return Cost(instructions, ends, behind, critical(traces), traces[0].counts(), aside(traces[0]))


def times(cost: Cost, factor: float) -> Cost:
    counts = Counter({op: factor * count for op, count in cost.counts.items()})
    each = (tuple(factor * n for n in some) for some in (cost.instructions, cost.cycles, cost.behind))
    return Cost(*each, factor * cost.critical, counts, factor * cost.aside)


def less(a: Cost, b: Cost) -> Cost:
    counts = Counter(a.counts)
    counts.subtract(b.counts)
    pairs = ((a.instructions, b.instructions), (a.cycles, b.cycles), (a.behind, b.behind))
    each = (tuple(x - y for x, y in zip(*pair, strict=True)) for pair in pairs)
    kept = Counter({op: n for op, n in counts.items() if n})
    return Cost(*each, a.critical - b.critical, kept, a.aside - b.aside)


def costs(
    program: Path,
    call: Call,
    device: Device,
    which: int,
    kernel: Kernel,
    latency: Latency,
    warps: tuple[int, ...] = (0,),
) -> Costs:
    """Of the call's `which`-th launch."""
    launch = launches(program, call, device)[which]
    if launch.tiles.count <= launch.tiles.groups:  # no more than one for each CTA
        traces = walked(kernel, launch, latency, warps)
        whole = cost_of(traces)
        return Costs(times(whole, 0), whole, tuple(traces))
    fewer, more = (1, 2) if launch.tiles.pieces >= PIECES else (FEW, MORE)
    short, long = (walked(kernel, with_tiles(program, call, device, which, n), latency, warps) for n in (fewer, more))
    tile = times(less(cost_of(long), cost_of(short)), 1 / (more - fewer))
    return Costs(tile, less(cost_of(short), times(tile, fewer)), tuple(long))
