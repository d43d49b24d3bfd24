"""What a kernel's machine code is held to, and one kernel looked at for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .calls import Call, Device, Launch, launches
from .code import Instruction, Kernel
from .tiles import costs
from .toolkit import compiled
from .warp import Latency, Trace

# Waits for all of a thread's memory operations, for the whole GPU, and throws away the L1: what a barrier or a fence with
# a scope beyond the CTA turns into. One for the CTA alone costs little.
ORDERING = ("MEMBAR", "ERRBAR", "CCTL")
LOADS = ("LDG", "LD")
NEAR = 4  # instructions: a load waited for sooner than that hides nothing
REGISTERS, WARPS = 65536, 64  # of a multiprocessor of cc 8.0, 9.0 or 10.0
RESERVED = 1024  # bytes of shared memory that the system takes of each CTA
LINE = 128  # bytes of code that are fetched together
RETRACTING = 16  # warps of a CTA that steps an orthonormal matrix


def team_of(launch: Launch) -> dict[int, int]:
    """One of the warps of a CTA for each kind of work, and how many there are of its kind."""
    if launch.tiles.sets > 0:  # 8 edit, the ninth moves the tiles, three work out coordinates
        return {0: 8, 8: 1, 9: 3}
    warps = launch.threads // 32
    if launch.kernel.startswith("step_kernel"):  # the first factors for all, those behind step plain parameters
        return {0: 1, 1: RETRACTING - 1} | ({RETRACTING: warps - RETRACTING} if warps > RETRACTING else {})
    return {0: warps}


def walked_loops(trace: Trace) -> set[int]:
    """Indices of the instructions of the loops that a walk went round in."""
    blocks = trace.kernel.blocks
    inside: set[int] = set()
    for loop in trace.kernel.loops:
        if len(trace.visits(blocks[loop.head].first)) > 1:
            inside |= {i for b in loop.blocks for i in range(blocks[b].first, blocks[b].end)}
    return inside


def ordering_in_loops(trace: Trace) -> list[Instruction]:
    """Fences in loops that a walk went round in, whether or not it met them."""
    code = trace.kernel.code
    return [code[i] for i in sorted(walked_loops(trace)) if code[i].base in ORDERING and ".CTA" not in code[i].op]


def waited_loads(trace: Trace) -> list[Instruction]:
    """Loads from global memory in loops that were alone on their way and waited for at once: a round trip each time."""
    code, inside = trace.kernel.code, walked_loops(trace)
    found: set[int] = set()
    on_their_way: list[tuple[int, int]] = []  # (place in the walk, index) of loads not yet waited for
    for place, step in enumerate(trace.steps):
        x = code[step.index]
        if any(code[i].sets in x.waits for _, i in on_their_way):
            at, i = on_their_way[0]
            if len(on_their_way) == 1 and place - at <= NEAR and i in inside:
                found.add(i)
            on_their_way = [(at, i) for at, i in on_their_way if code[i].sets not in x.waits]
        if x.base in LOADS and x.sets >= 0 and x.pc in trace.traffic:
            on_their_way.append((place, step.index))
    return [code[i] for i in sorted(found)]


def scattered(trace: Trace) -> list[Instruction]:
    """Accesses to global memory in loops that touch more than twice the sectors that their bytes fill."""
    code = trace.kernel.code
    traffic = {i: trace.traffic.get(code[i].pc, [0, 0]) for i in sorted(walked_loops(trace))}
    return [code[i] for i, (filled, touched) in traffic.items() if touched > 2 * filled]


def kept(traces: Sequence[Trace]) -> int:
    """Bytes of code, in whole lines, that one of these warps goes through more than once: what the instruction cache has to
    keep."""
    lines: set[int] = set()
    for trace in traces:
        visits = Counter(step.index for step in trace.steps)
        lines |= {trace.kernel.code[i].pc // LINE for i, times in visits.items() if times > 1}
    return LINE * len(lines)


def per_sm(kernel: Kernel, launch: Launch, device: Device) -> int:
    """CTAs that a multiprocessor holds: registers (8 at a time, a warp) and shared memory decide."""
    warps = launch.threads // 32
    by_registers = REGISTERS // (-(-kernel.registers // 8) * 8 * 32) // warps
    return min(by_registers, (device.shared + RESERVED) // (launch.shared + RESERVED), WARPS // warps)


@dataclass(frozen=True)
class Budget:
    """What one launch of a call may cost. `vector`: 16 bytes that a lane loads from or stores to global memory."""

    call: Call
    which: int  # of the call's launches
    kernel: str  # without its template's arguments
    per_vector: float  # instructions of a warp, tiles only where there are tiles
    registers: int
    per_sm: int  # CTAs a multiprocessor at least
    why: str
    size: int = 48 * 1024  # bytes of code
    fences: tuple[str, ...] = ()  # opcodes among ORDERING that it may have in loops
    vectors: float = 0  # that a lane moves in all, where there are no tiles
    kept: int = 48 * 1024  # bytes of code that the call runs more than once


@dataclass(frozen=True)
class Found:
    """The same figures, as they are."""

    kernel: str
    per_vector: float
    registers: int
    per_sm: int
    size: int
    kept: int
    ordering: tuple[str, ...] = ()
    waited: tuple[str, ...] = ()
    scattered: tuple[str, ...] = ()

    def faults(self, budget: Budget) -> list[str]:
        wrong = []
        if self.kernel.split("<")[0] != budget.kernel:
            wrong.append(f"is not {budget.kernel}: another plan than the one this budget is for")
        if self.per_vector > budget.per_vector:
            wrong.append(f"{self.per_vector:.0f} instructions for 16 bytes a lane, at most {budget.per_vector:.0f}")
        if self.registers > budget.registers:
            wrong.append(f"{self.registers} registers, at most {budget.registers}")
        if self.per_sm < budget.per_sm:
            wrong.append(f"{self.per_sm} CTAs a multiprocessor, at least {budget.per_sm}")
        if self.size > budget.size:
            wrong.append(f"{self.size} bytes of code, at most {budget.size}")
        if self.kept > budget.kept:
            wrong.append(f"{self.kept} bytes of code run more than once, at most {budget.kept}")
        wrong += [f"in a loop: {text}" for text in self.ordering if not any(op in text for op in budget.fences)]
        wrong += [f"waited for at once, in a loop: {text}" for text in self.waited]
        wrong += [f"touches more than twice what it moves, in a loop: {text}" for text in self.scattered]
        return wrong


def found(kernel: Kernel, launch: Launch, device: Device, traces: Sequence[Trace], per_vector: float) -> Found:
    """`traces`: of warps that do different work, the first of them the one whose loops are looked at."""
    listed = [tuple(map(str, check(traces[0]))) for check in (ordering_in_loops, waited_loads, scattered)]
    resident = per_sm(kernel, launch, device)
    return Found(launch.kernel, per_vector, kernel.registers, resident, kernel.size, kept(traces), *listed)


def look(program: Path, budgets: list[Budget], device: Device, latency: Latency, folder: Path) -> list[Found]:
    """Compiles the one kernel that all these budgets are for, and walks it once for each."""
    seen = []
    kernel = None
    for budget in budgets:
        launch = launches(program, budget.call, device)[budget.which]
        kernel = kernel or compiled(launch.kernel, folder)
        tiled, team = launch.tiles.count > 0, team_of(launch)
        cost = costs(program, budget.call, device, budget.which, kernel, latency, tuple(team))
        each = (cost.tile if tiled else cost.rest).instructions
        all_warps = sum(n * of_one for n, of_one in zip(team.values(), each, strict=True))
        vectors = launch.tiles.bytes / 512 if tiled else budget.vectors * launch.threads / 32
        seen.append(found(kernel, launch, device, cost.whole, all_warps / vectors))
    return seen
