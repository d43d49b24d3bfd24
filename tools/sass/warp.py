"""One warp's way through a kernel, with the arguments of a launch: which instructions it issues, and an estimate of the
time it would take alone.

Integers and predicates are worked out exactly, so that every branch goes where it would; what is loaded from memory is
unknown (`memory` may know better). Barriers and transactions are taken to be complete as soon as they are met: waiting
for other warps is not this file's affair. A branch that depends on something unknown is asked for (`decide`).

Time: an instruction is issued as soon as the one before has stalled for its cycles and the scoreboards that it waits for
are down; a scoreboard goes down a latency after the instruction that raised it (`latency`, by opcode).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from . import floats  # noqa: F401  adds to what alu knows
from .alu import apply
from .calls import Launch
from .code import Instruction, Kernel
from .registers import Registers, address, sides, width
from .shared import GLOBAL, STORES, WINDOW, Provenance, Shared, load, sectors, store
from .shared import LOADS as SHARED_LOADS
from .values import ALL, LANES, UNKNOWN, Value, operand

CLUSTERED = 0x140  # in bank 0: whether this is a launch of clusters, which a cluster's barrier asks


class Undecided(RuntimeError):
    """A branch that depends on what nobody knows."""


@dataclass(frozen=True)
class Latency:
    """Cycles from an instruction's issue until its result is there, by opcode."""

    by_op: Mapping[str, float]
    other: float = 10
    operands_read: float = 20  # at most, until a scoreboard for read operands is down
    taken: float = 8  # a branch that is taken, beyond its stall

    def of(self, x: Instruction) -> float:
        return self.by_op.get(x.base, self.other)


@dataclass
class Step:
    """An instruction issued."""

    index: int
    time: float


@dataclass
class Trace:
    kernel: Kernel
    steps: list[Step] = field(default_factory=list)
    end: float = 0
    stopped: bool = False  # at `most` visits, before its end
    traffic: dict[int, list[int]] = field(default_factory=dict)  # pc -> sectors of global memory, see sectors()

    def visits(self, index: int) -> list[int]:
        """Places in `steps` of one instruction."""
        return [place for place, step in enumerate(self.steps) if step.index == index]

    def counts(self) -> Counter[str]:
        """How often each opcode was issued, its modifiers told apart."""
        return Counter(self.kernel.code[step.index].op for step in self.steps)


@dataclass
class Group:
    """Lanes that are at one place together."""

    lanes: Value
    at: int


class Warp:
    def __init__(
        self,
        kernel: Kernel,
        launch: Launch,
        latency: Latency,
        warp: int = 0,
        cta: tuple[int, int] = (0, 0),
        shared: Shared | None = None,
        memory: Callable[[Instruction, Value, int], Value] | None = None,
        decide: Callable[[Instruction], bool] | None = None,
    ):
        self.kernel, self.latency, self.memory, self.decide = kernel, latency, memory, decide
        self.shared, self.provenance = shared or Shared(), Provenance()
        self.place = {x.pc: i for i, x in enumerate(kernel.code)}
        bank0 = bytearray(kernel.parameters) + launch.bytes
        for at, number in zip(range(0, 24, 4), (launch.threads, 1, 1, *launch.grid), strict=True):
            bank0[at : at + 4] = number.to_bytes(4, "little")
        bank0[CLUSTERED : CLUSTERED + 4] = int(launch.cluster > 1).to_bytes(4, "little")
        self.registers = Registers({0: bytes(bank0), 2: kernel.constants})
        lane = LANES.astype(np.int64)
        rank = cta[0] % launch.cluster
        self.registers.special = {
            "SR_TID.X": lane + 32 * warp,
            "SR_TID.Y": lane * 0,
            "SR_TID.Z": lane * 0,
            "SR_LANEID": lane,
            "SR_CTAID.X": lane * 0 + cta[0],
            "SR_CTAID.Y": lane * 0 + cta[1],
            "SR_CTAID.Z": lane * 0,
            "SR_CgaCtaId": lane * 0 + rank,
            "SR_SWINHI": lane * 0 + WINDOW,
            "SRZ": lane * 0,
        }
        self.traffic: dict[int, list[int]] = {}
        self.live = ALL.copy()
        self.waiting: list[Group] = []
        self.barriers: dict[
            str, tuple[Value, Value, int]
        ] = {}  # name -> who takes part, who has come, where they go on
        self.boards = [0.0] * 6
        self.now = 0.0

    def run(self, stop_at: int = -1, most: int = 0, limit: int = 400_000) -> Trace:
        """To the end, or to the `most`-th visit of the instruction at index `stop_at`."""
        trace = Trace(self.kernel, traffic=self.traffic)
        group: Group | None = Group(ALL, 0)
        visits = 0
        while group is not None:
            x = self.kernel.code[group.at]
            if group.at == stop_at:
                visits += 1
                if visits == most:
                    trace.stopped = True
                    break
            if len(trace.steps) >= limit:
                raise RuntimeError(f"{self.kernel.name}: more than {limit} instructions, last at {x}")
            for board in x.waits:
                self.now = max(self.now, self.boards[board])
            trace.steps.append(Step(group.at, self.now))
            if x.sets >= 0:
                self.boards[x.sets] = max(self.boards[x.sets], self.now + self.latency.of(x))
            if x.frees >= 0:
                read = min(self.latency.of(x), self.latency.operands_read)
                self.boards[x.frees] = max(self.boards[x.frees], self.now + read)
            self.now += max(x.stall, 1)
            with np.errstate(all="ignore"):  # lanes where a number is unknown are worked out, too
                group = self.follow(x, group)
        trace.end = self.now
        return trace

    # ---- where the lanes go -----------------------------------------------------------------------------------------

    def follow(self, x: Instruction, group: Group) -> Group | None:
        lanes = self.certain(x, self.guarded(x, group.lanes), group.lanes) if x.guard else group.lanes
        control = CONTROL.get(x.base)
        if control is not None:
            return control(self, x, group, lanes)
        self.write(x, lanes)
        group.at += 1
        return group

    def guarded(self, x: Instruction, lanes: Value) -> Value:
        """1, 0 or UNKNOWN a lane: whether the instruction runs there."""
        flag = operand(x.guard)
        assert flag is not None
        return np.where(lanes, self.registers.predicate(flag), 0)

    def certain(self, x: Instruction, under: Value, lanes: Value) -> Value:
        if not (under < 0).any():
            runs = under > 0
            return ALL if runs.all() else runs
        if x.base in CONTROL:
            return lanes & (under != 0) if self.asked(x) else under > 0
        return under != 0  # runs perhaps: what it writes is then unknown, see write()

    def asked(self, x: Instruction) -> bool:
        if self.decide is None:
            raise Undecided(f"{self.kernel.name}: where does this go? {x}")
        return self.decide(x)

    def write(self, x: Instruction, lanes: Value) -> None:
        if not lanes.any():
            return
        if x.base in GLOBAL:
            filled, touched = sectors(self.registers, x, lanes)
            if touched:
                seen = self.traffic.setdefault(x.pc, [0, 0])
                seen[:] = seen[0] + filled, seen[1] + touched
        if x.base in LOADS:
            self.load(x, lanes)
            return
        if x.base == "SYNCS" and x.args and operand(x.args[0]) is not None:
            flag = operand(x.args[0])
            self.registers.write(flag, np.ones(32, dtype=np.int64), lanes)  # a phase waited for has come
            return
        if x.base in STORES:
            store(self.shared, self.registers, self.provenance, x, lanes)
        if x.base in NO_RESULT:
            return
        apply(self.registers, x, lanes)
        self.provenance.note(x, *sides(x))
        if x.guard:
            flag = operand(x.guard)
            assert flag is not None
            doubt = lanes & (self.registers.predicate(flag) < 0)
            if doubt.any():
                for one in sides(x)[0]:
                    for further in range(width(x)):
                        self.registers.write(one, np.full(32, UNKNOWN), doubt, further)

    def load(self, x: Instruction, lanes: Value) -> None:
        to = [one for one in (operand(arg) for arg in x.args[:2]) if one is not None]
        place = address(self.registers, next((arg for arg in x.args if "[" in arg), ""))
        left = load(self.shared, self.registers, x, lanes) if x.base in SHARED_LOADS else []
        outside = np.full(32, UNKNOWN, dtype=np.int64)
        for further in range(width(x)):
            value = self.memory(x, place, further) if self.memory is not None else outside
            if further < len(left):
                value = np.where(left[further] >= 0, left[further], value)
            self.registers.write(to[-1], value, lanes, further)
        numbers = bool(left) and bool((np.array(left)[:, lanes] >= 0).all())
        self.provenance.mark(to[-1:], width(x), not numbers)

    def jump(self, x: Instruction, pc: int, group: Group, taken: Value) -> Group:
        """`taken` lanes go to `pc`, the others on."""
        self.now += self.latency.taken
        rest = group.lanes & ~taken
        if rest.any():
            self.waiting.append(Group(rest, group.at + 1))
        return Group(taken, self.place[pc])

    def next_group(self) -> Group | None:
        """The lanes that are furthest behind, all that are there together."""
        if not self.waiting:
            if self.live.any():
                blocked = {name: self.kernel.code[at] for name, (_, _, at) in self.barriers.items()}
                raise RuntimeError(f"{self.kernel.name}: lanes wait for each other at {blocked}")
            return None
        at = min(group.at for group in self.waiting)
        together = [group for group in self.waiting if group.at == at]
        self.waiting = [group for group in self.waiting if group.at != at]
        lanes = np.any([group.lanes for group in together], axis=0)
        return Group(ALL if lanes.all() else lanes, at)

    def released(self, name: str) -> bool:
        """Sends on those who wait at a barrier if all have come."""
        takes_part, come, at = self.barriers[name]
        if not come.any() or (takes_part & ~come).any():
            return False
        self.waiting.append(Group(come, at))
        self.barriers[name] = (takes_part, np.zeros(32, dtype=bool), at)
        return True

    def meet(self, name: str, takes_part: Value, group: Group) -> Group | None:
        _, come, _ = self.barriers.get(name, (takes_part, np.zeros(32, dtype=bool), 0))
        self.barriers[name] = (takes_part, come | group.lanes, group.at + 1)
        self.released(name)
        return self.next_group()

    # ---- control flow, an opcode each -------------------------------------------------------------------------------

    def branch(self, x: Instruction, group: Group, lanes: Value) -> Group | None:
        taken = lanes.astype(np.int64)
        if ".DIV" in x.op or ".CONV" in x.op:  # if the warp has diverged: lanes meet before what asks for that
            taken = taken * 0
        for arg in x.args[:-1]:
            flag = operand(arg)
            if flag is not None and flag.kind in ("P", "UP"):
                value = self.registers.predicate(flag)
                if (lanes & (value < 0)).any():
                    value = np.full(32, int(self.asked(x)))
                taken = np.where(value > 0, taken, 0)
        chosen = taken > 0
        if not chosen.any():
            group.at += 1
            return group
        return self.jump(x, x.targets[0], group, ALL if chosen.all() else chosen)

    def indexed(self, x: Instruction, group: Group, lanes: Value) -> Group | None:
        base, _, offset = x.args[0].partition(" ")
        where = operand(base)
        assert where is not None
        value = self.registers.integer(where)
        if (lanes & (value < 0)).any():
            raise Undecided(f"{self.kernel.name}: where does this go? {x}")
        far = value + int(offset or "0", 16) + x.pc + 16 & 0xFFFFFFFF
        return self.many(x, group, lanes, far)

    def many(self, x: Instruction, group: Group, lanes: Value, targets: Value) -> Group | None:
        self.now += self.latency.taken
        rest = group.lanes & ~lanes
        if rest.any():
            self.waiting.append(Group(rest, group.at + 1))
        for pc in set(targets[lanes]):
            self.waiting.append(Group(lanes & (targets == pc), self.place[int(pc)]))
        return self.next_group()

    def call(self, x: Instruction, group: Group, lanes: Value) -> Group | None:
        if not lanes.any():
            group.at += 1
            return group
        return self.jump(x, x.targets[0], group, lanes)

    def back(self, x: Instruction, group: Group, lanes: Value) -> Group | None:
        where = operand(x.args[0].split(" ")[0])
        assert where is not None
        return self.many(x, group, lanes, self.registers.integer(where))

    def leave(self, x: Instruction, group: Group, lanes: Value) -> Group | None:
        self.live &= ~lanes
        for name, (takes_part, come, at) in list(self.barriers.items()):
            self.barriers[name] = (takes_part & ~lanes, come, at)
            self.released(name)
        rest = group.lanes & ~lanes
        if rest.any():
            self.waiting.append(Group(rest, group.at + 1))
        return self.next_group()

    def expect(self, x: Instruction, group: Group, lanes: Value) -> Group | None:
        self.barriers[x.args[0]] = (lanes.copy(), np.zeros(32, dtype=bool), group.at + 1)
        group.at += 1
        return group

    def join(self, x: Instruction, group: Group, lanes: Value) -> Group | None:
        takes_part = self.barriers[x.args[0]][0] if x.args[0] in self.barriers else group.lanes
        return self.meet(x.args[0], takes_part, group)

    def give_up(self, x: Instruction, group: Group, lanes: Value) -> Group | None:
        name = next(arg for arg in x.args if re.fullmatch(r"B\d+", arg))
        if name in self.barriers:
            takes_part, come, at = self.barriers[name]
            self.barriers[name] = (takes_part & ~lanes, come, at)
            self.released(name)
        group.at += 1
        return group

    def sync(self, x: Instruction, group: Group, lanes: Value) -> Group | None:
        if "COLLECTIVE" in x.op:  # where lanes have parted, which branch() knows nothing of
            group.at += 1
            return group
        wanted = self.live
        mask = operand(x.args[0]) if x.args and ".ALL" not in x.op else None
        if mask is not None:
            bits = self.registers.integer(mask)[group.lanes][0]
            wanted = self.live & (bits < 0 or bits >> LANES & 1 > 0)
        return self.meet("WARPSYNC", wanted.copy(), group)


CONTROL: dict[str, Callable[[Warp, Instruction, Group, Value], Group | None]] = {
    "BRA": Warp.branch,
    "BRX": Warp.indexed,
    "BRXU": Warp.indexed,
    "CALL": Warp.call,
    "RET": Warp.back,
    "EXIT": Warp.leave,
    "BSSY": Warp.expect,
    "BSYNC": Warp.join,
    "BREAK": Warp.give_up,
    "WARPSYNC": Warp.sync,
}
LOADS = ("LDG", "LDS", "LD", "LDL")
NO_RESULT = frozenset(
    """BAR MEMBAR ERRBAR CGAERRBAR CCTL UCGABAR_ARV UCGABAR_WAIT DEPBAR LDGDEPBAR LDGSTS NOP YIELD NANOSLEEP FENCE
    ENDCOLLECTIVE STS STSM STG ST STL STAS RED ARRIVES SYNCS UTMALDG UBLKCP UBLKRED UTMACMDFLUSH ACQBULK PREEXIT
    BMOV""".split()
)
