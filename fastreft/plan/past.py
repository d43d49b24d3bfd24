"""Forwards that are over and that a backward may still recompute: whoever does so, the blocks find the plan of their own.

A recomputed block runs within a backward, on behalf of a node of autograd's graph, and nodes are numbered in the order in
which they were made. So a forward is known by the numbers that it began and ended with, whether its blocks are recomputed by
Transformers, torch's wrappers, FSDP or somebody's own function, and however deep. Imports torch alone.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .regions import Regions

KEPT = 8  # as many plans live on by themselves: more do as long as the outputs of their forwards

THREADS = (
    "{} is recomputed within a backward, and forwards of several threads may be the one it belongs to: run the forwards that "
    "are recomputed in one thread, or each with its backward after another"
)
UNKNOWN = (
    "{} is recomputed within a backward, and the forward that it belongs to is not known: its edit would be lost; keep that "
    "forward's output until the backward is over"
)

FORGOTTEN = (
    "{} is recomputed within a backward, and the forward that it belongs to is not known, of which its {} would be needed, "
    "given to a module round it: give them to the model itself, within what is recomputed"
)


class Forward(NamedTuple):
    """A forward that is over: the numbers of the nodes that its thread made, ``begin`` up to ``end``, and its plan."""

    begin: int
    end: int
    thread: object
    plan: weakref.ref[Any]
    graph: weakref.ref[Any]  # dead once its output's graph is

    def holds(self, number: int) -> bool:
        return self.begin <= number < self.end


class _Alive:
    """What the graph of a forward's output holds."""

    def __init__(self, plan: Any):
        self.plan = plan


class _Again(threading.local):
    """What a thread recomputed, for what is recomputed within it: the numbers that its nodes are between, and the plan."""

    def __init__(self) -> None:
        self.thread = object()  # by which it is known: its number may be another's afterwards
        self.done: deque[tuple[int, int, weakref.ref[Any]]] = deque(maxlen=256)


class Past:
    """The forwards of a model that a backward may recompute; its threads share it, as a backward may be in another.

    ``alone`` is told of a block that is run by itself, within no forward and no backward, until it has said so. Where it is
    None, forwards that edit nothing are not noted, and a recomputation that belongs to no other belongs to one of those.
    """

    def __init__(self, alone: Callable[[nn.Module], bool] | None = None) -> None:
        self.alone, self.notes_all = alone, alone is not None
        self.forwards: list[Forward] = []
        self.lock = threading.Lock()
        self.latest: deque[Any] = deque(maxlen=KEPT)
        self.again = _Again()
        self.regions = Regions()

    def __reduce__(self) -> tuple[Any, ...]:
        return Past, (self.alone,), {"notes_all": self.notes_all}  # the copy of a model has no past

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    @property
    def asks(self) -> bool:
        """Is there something to do for a block that is run within no forward?"""
        return self.alone is not None or torch._C._current_autograd_node() is not None

    def note(self, plan: Any, begin: int, output: Any) -> None:
        """Keep the plan of a forward that is over, as long as its output's graph lives: the graph holds it."""
        end, graph = torch.autograd._get_sequence_nr(), _Alive(plan)
        for tensor in _tensors(output):
            if tensor.grad_fn is not None:
                kept: Any = tensor.grad_fn.metadata  # typed as a method, and a dict
                kept["fastreft"] = graph
        self.latest.append(plan)
        with self.lock:  # replicas end their forwards side by side
            alive = [forward for forward in self.forwards if forward.plan() is not None]
            self.forwards = [*alive, Forward(begin, end, self.again.thread, weakref.ref(plan), weakref.ref(graph))]

    @torch.compiler.disable  # within a compiled block: torch's compiler knows nothing of backwards
    def find(self, block: nn.Module) -> Any:
        """The plan of the forward that ``block`` is recomputed for; None where no backward is under way.

        ``RuntimeError`` where it is none of those there are, and all are noted: the block would not be edited.
        """
        node = torch._C._current_autograd_node()
        if node is None or not self.forwards:
            if self.alone is not None and self.alone(block):
                self.alone = None  # it was said
            return None
        number = node._sequence_nr()
        # The newest goes before, of those with a graph, and of replicas that ran side by side the one with this block.
        held = [f for f in reversed(self.forwards) if f.holds(number) and f.plan() is not None]
        held = [f for f in held if f.graph() is not None] or held
        held = [f for f in held if block in getattr(f.plan(), "active", (block,))] or held
        if len({f.thread for f in held}) > 1:  # threads count for themselves
            raise RuntimeError(THREADS.format(f"a {type(block).__name__}"))
        plan = held[0].plan() if held else None
        if plan is None:  # its node was made by a recomputation, after the forwards there are
            plan = next((ref() for after, at, ref in self.again.done if after <= number <= at), None)
        if plan is None and not self.notes_all:
            return None
        if plan is None:
            raise RuntimeError(UNKNOWN.format(f"a {type(block).__name__}"))
        after = max(forward.end for forward in self.forwards)
        self.again.done.append((after, torch.autograd._get_sequence_nr(), weakref.ref(plan)))
        return plan


def _tensors(output: Any, deep: int = 3) -> Iterator[Tensor]:
    """The tensors of a model's output."""
    if isinstance(output, Tensor):
        yield output
    elif deep and isinstance(output, (dict, list, tuple)):
        for value in output.values() if isinstance(output, dict) else output:
            yield from _tensors(value, deep - 1)
