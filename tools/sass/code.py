"""A listing of nvdisasm as instructions with their control codes, basic blocks and natural loops.

Control codes are what the assembler tells the hardware about an instruction, in the upper bits of its encoding: how many
cycles the warp rests after it, which of six scoreboards it raises until its result is there, and which it waits for.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property

STEP = 16  # bytes of an instruction

LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;?\s*/\* 0x[0-9a-f]{16} \*/")
UPPER = re.compile(r"^\s*/\* (0x[0-9a-f]{16}) \*/")
LABEL = re.compile(r"^(\.L_\w+|\$[\w$.]+):")  # a place, or a routine that the compiler adds
SECTION = re.compile(r"^\s*\.section\s+\.text\.([^,\s]+)")
SOURCE = re.compile(r'//## File "([^"]+)", line (\d+)( inlined at)?')
GUARD = re.compile(r"^@(!?U?P[0-9T]+)\s+")
NAMED = re.compile(r"`\((\.L_\w+|\$[\w$.]+)\)")
TABLE = re.compile(r'\(\*"BRANCH_TARGETS ([^"]*)"\*\)')
OPERANDS = re.compile(r",\s*(?![^\[(]*[\])])")


@dataclass
class Instruction:
    pc: int
    op: str  # with its modifiers: IMAD.WIDE.U32
    args: tuple[str, ...]
    guard: str = ""  # the predicate it is under: P0, !P0, UP1
    targets: tuple[int, ...] = ()  # where a branch may go, the next instruction aside
    stall: int = 1  # cycles until the warp's next
    yields: bool = False
    sets: int = -1  # the scoreboard raised until its result is there
    frees: int = -1  # the one raised until its operands have been read
    waits: frozenset[int] = frozenset()
    where: tuple[tuple[str, int], ...] = ()  # (file, line), innermost first, where the listing has lines

    @cached_property
    def base(self) -> str:
        return self.op.split(".")[0]

    @property
    def text(self) -> str:
        guard = f"@{self.guard} " if self.guard else ""
        return f"{guard}{self.op} {', '.join(self.args)}".strip()

    def __str__(self) -> str:
        places = [f"{file.rsplit('/', 1)[-1]}:{line}" for file, line in self.where]
        return f"{self.pc:05x}: {self.text}" + (f"  [{' < '.join(places)}]" if places else "")


@dataclass
class Block:
    first: int  # index of its first instruction
    end: int  # past its last
    next: list[int] = field(default_factory=list)  # indices of blocks


@dataclass(eq=False)
class Loop:
    head: int  # index of its first block
    blocks: set[int]
    parent: Loop | None = None

    @property
    def depth(self) -> int:
        return 1 + (self.parent.depth if self.parent else 0)


@dataclass
class Kernel:
    name: str
    code: list[Instruction]
    constants: bytes = b""  # the kernel's own constants, bank 2: tables of jumps
    registers: int = 0
    parameters: int = 0x210  # where its arguments begin in bank 0

    @property
    def size(self) -> int:
        """Bytes of code."""
        return STEP * len(self.code)

    @cached_property
    def blocks(self) -> list[Block]:
        return blocks_of(self.code)

    @cached_property
    def loops(self) -> list[Loop]:
        return loops_of(self.blocks)

    def inside(self, loop: Loop) -> list[Instruction]:
        """A loop's instructions, those of inner loops among them, in the order they lie."""
        return [x for b in sorted(loop.blocks) for x in self.code[self.blocks[b].first : self.blocks[b].end]]


def control(upper: int) -> dict[str, object]:
    """The control codes in the upper half of an encoding."""
    bits = upper >> 41
    sets, frees, waits = bits >> 5 & 7, bits >> 8 & 7, bits >> 11 & 63
    return {
        "stall": bits & 15,
        "yields": not bits >> 4 & 1,  # the bit says that the warp should stay
        "sets": sets if sets < 6 else -1,
        "frees": frees if frees < 6 else -1,
        "waits": frozenset(board for board in range(6) if waits >> board & 1),
    }


def parse(listing: str) -> list[Kernel]:
    """The kernels of `nvdisasm -c -hex` (or `-gi` for lines of source, too)."""
    kernels: list[Kernel] = []
    labels: dict[str, int] = {}
    open_targets: list[tuple[Instruction, list[str]]] = []
    pending: list[str] = []
    chain: list[tuple[str, int]] = []
    more = False  # the next source line belongs to the same chain
    last: Instruction | None = None

    def resolve() -> None:
        for instruction, names in open_targets:
            instruction.targets = tuple(labels[name] for name in names if name in labels)
        labels.clear()
        open_targets.clear()

    for line in listing.splitlines():
        if match := SECTION.match(line):
            resolve()
            kernels.append(Kernel(match[1], []))
            chain = []
        elif match := SOURCE.search(line):
            at = (match[1], int(match[2]))
            # A chain is one line a place: the innermost with "inlined at", and each place again by itself.
            chain = [*chain, at] if more else [at]
            more = bool(match[3])
        elif match := LABEL.match(line):
            pending.append(match[1])
        elif kernels and (match := LINE.match(line)):
            last = instruction_of(int(match[1], 16), match[2], tuple(chain))
            names = NAMED.findall(match[2])
            if table := TABLE.search(match[2]):
                names += [name for name in table[1].split(",") if name]
            if names:
                open_targets.append((last, names))
            labels.update(dict.fromkeys(pending, last.pc))
            pending = []
            kernels[-1].code.append(last)
        elif last is not None and (match := UPPER.match(line)):
            for key, value in control(int(match[1], 16)).items():
                setattr(last, key, value)
            last = None
    resolve()
    return kernels


def instruction_of(pc: int, text: str, where: tuple[tuple[str, int], ...] = ()) -> Instruction:
    """From the text of one instruction, as a listing has it."""
    text = TABLE.sub("", text).strip()
    guard = ""
    if match := GUARD.match(text):
        guard, text = match[1], text[match.end() :]
    op, _, rest = text.partition(" ")
    args = tuple(arg.replace(".reuse", "").strip() for arg in OPERANDS.split(rest.strip())) if rest.strip() else ()
    return Instruction(pc, op, args, guard, where=where)


ENDS = ("EXIT", "RET", "BRX", "BRXU", "JMX", "JMP", "KILL", "BPT")  # nothing follows, unless under a predicate
BRANCHES = ("BRA", "CALL", "BRX", "BRXU")


def always_leaves(x: Instruction) -> bool:
    """Whether the instruction behind this one is never next."""
    whole = x.guard in ("", "PT", "UPT")
    if x.base == "BRA":
        conditional = any(re.fullmatch(r"!?U?P\d", arg) for arg in x.args) or ".DIV" in x.op or ".CONV" in x.op
        return whole and not conditional
    return whole and x.base in ENDS


def blocks_of(code: list[Instruction]) -> list[Block]:
    at = {x.pc: i for i, x in enumerate(code)}
    starts = {0}
    for i, x in enumerate(code):
        if x.base in BRANCHES:
            starts |= {at[pc] for pc in x.targets if pc in at}
        if x.base in BRANCHES or x.base in ENDS:
            starts.add(i + 1)
    order = sorted(start for start in starts if start < len(code))
    number = {start: b for b, start in enumerate(order)}
    blocks = [Block(start, end) for start, end in zip(order, [*order[1:], len(code)], strict=True)]
    for block in blocks:
        tail = code[block.end - 1]
        if tail.base in BRANCHES:
            block.next += [number[at[pc]] for pc in tail.targets if pc in at]
        if not always_leaves(tail) and block.end in number:
            block.next.append(number[block.end])
    return blocks


def loops_of(blocks: list[Block]) -> list[Loop]:
    """Natural loops, outer ones first: for each edge to a block that dominates its source, what lies between."""
    if not blocks:
        return []
    before: list[list[int]] = [[] for _ in blocks]
    for b, block in enumerate(blocks):
        for other in block.next:
            before[other].append(b)
    order = depth_first(blocks)
    rank = {b: i for i, b in enumerate(order)}
    parent = dominators(order, rank, before)

    def dominates(a: int, b: int) -> bool:
        while rank[b] > rank[a]:
            b = parent[b]
        return a == b

    bodies: dict[int, set[int]] = {}
    for b in order:
        for head in blocks[b].next:
            if not dominates(head, b):
                continue
            body = bodies.setdefault(head, {head})
            stack = [b]
            while stack:
                inner = stack.pop()
                if inner not in body:
                    body.add(inner)
                    stack += [other for other in before[inner] if other in rank]
    loops = [Loop(head, body) for head, body in sorted(bodies.items(), key=lambda item: -len(item[1]))]
    for i, loop in enumerate(loops):
        around = [outer for outer in loops[:i] if loop.blocks < outer.blocks]
        loop.parent = min(around, key=lambda outer: len(outer.blocks), default=None)
    return loops


def depth_first(blocks: list[Block]) -> list[int]:
    """Reachable blocks in reverse postorder."""
    order: list[int] = []
    seen = {0}
    stack = [(0, iter(blocks[0].next))]
    while stack:
        b, rest = stack[-1]
        following = next((other for other in rest if other not in seen), None)
        if following is None:
            order.append(b)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(blocks[following].next)))
    return order[::-1]


def dominators(order: list[int], rank: dict[int, int], before: list[list[int]]) -> dict[int, int]:
    """Each reachable block's immediate dominator (Cooper, Harvey, Kennedy)."""
    parent = {order[0]: order[0]}

    def meet(a: int, b: int) -> int:
        while a != b:
            while rank[a] > rank[b]:
                a = parent[a]
            while rank[b] > rank[a]:
                b = parent[b]
        return a

    changed = True
    while changed:
        changed = False
        for b in order[1:]:
            known = [other for other in before[b] if other in parent]
            found = known[0]
            for other in known[1:]:
                found = meet(found, other)
            if parent.get(b) != found:
                parent[b] = found
                changed = True
    return parent
