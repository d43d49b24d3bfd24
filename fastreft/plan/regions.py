"""Whole forwards that a backward runs again: which of those that somebody's checkpoint ran before it is each.

A checkpoint runs its function again from the start, so that its k-th forward of a model stands for the k-th of the first time.
Which checkpoint it is, torch says: one that is not reentrant has hooks on saved tensors that hold its frame; a reentrant one is
a node, made just before its function was run without gradients, so that no node came between. Imports torch alone.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from typing import Any

import torch
from torch import nn
from torch.autograd.function import BackwardCFunction

KEPT = 256  # regions; and a quarter as many forwards in one that is known by its number
Key = tuple[Any, ...]


class _Turns(threading.local):
    """How many forwards of a model a thread has run again, by the region, the backward and the model."""

    def __init__(self) -> None:
        self.done: OrderedDict[Key, int] = OrderedDict()
        self.thread = object()


class Regions:
    """Plans of forwards, by the region and the turn in it. Those of a frame live as long as it; others are not kept alive.

    Threads share them, as a backward may be in another.
    """

    def __init__(self) -> None:
        self.frames: weakref.WeakKeyDictionary[Any, list[Any]] = weakref.WeakKeyDictionary()
        self.numbers: OrderedDict[Key, list[tuple[int, weakref.ref[Any]]]] = OrderedDict()
        self.lock = threading.Lock()  # of the two above
        self.turns = _Turns()
        self.said: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()

    def enter(self, plan: Any) -> None:
        """A forward begins that has ``plan``."""
        frame, again = _checkpoint()
        with self.lock:
            if frame is not None and not again:
                self.frames.setdefault(frame, []).append(plan)
            if torch.is_grad_enabled():
                return
            held = self.numbers.setdefault((torch.autograd._get_sequence_nr(), self.turns.thread), [])
            while len(self.numbers) > KEPT:
                self.numbers.popitem(last=False)
            if len(held) < KEPT // 4:
                held.append((id(plan.owner), weakref.ref(plan)))

    def again(self, owner: nn.Module) -> Any:
        """The plan that the forward of ``owner`` that begins had the first time; None where it is no second time, or of none
        that is known."""
        frame, again = _checkpoint()
        node = torch._C._current_autograd_node()
        if again:
            with self.lock:
                plans = [plan for plan in self.frames.get(frame, ()) if plan.owner is owner]
            region: Any = weakref.ref(frame)  # and not its address, which another has afterwards
        elif isinstance(node, BackwardCFunction):
            region = node._sequence_nr()
            with self.lock:
                found = [held for (number, _), held in self.numbers.items() if number == region + 1]
            # Threads count for themselves, and the node does not say whose it is.
            plans = [ref() for of, ref in found[0] if of == id(owner)] if len(found) == 1 else []
        else:
            return None
        key = region, torch._C._current_graph_task_id(), id(owner)
        done = self.turns.done
        turn = done.get(key, 0)
        done[key] = turn + 1
        while len(done) > KEPT:
            done.popitem(last=False)
        plan = plans[turn] if turn < len(plans) else None
        return plan if plan is not None and plan.owner is owner else None

    def wanting(self, owner: nn.Module, own: Any, outer: list[Any]) -> list[str]:
        """What modules round ``owner`` were given in forwards before, in words, and are not in this one, should it be one that
        is run again. ``own`` and ``outer``, NamedTuples alike, are what it is given and what they are."""
        handed = {name for said in outer for name, value in said._asdict().items() if value is not None}
        if torch._C._current_autograd_node() is not None:
            missing = self.said.get(owner, set()) - handed
            return sorted(name for name in missing if getattr(own, name) is None)
        if handed:
            self.said.setdefault(owner, set()).update(handed)
        return []


def _checkpoint() -> tuple[Any, bool]:
    """The frame of torch's checkpoint, not reentrant, whose function is run, None where there is none; is it run again?"""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    if hooks is None:
        return None, False
    pack = getattr(hooks[0], "_torchdynamo_orig_callable", hooks[0])
    for cell in getattr(pack, "__closure__", None) or ():
        held = cell.cell_contents
        again = isinstance(held, weakref.ref)
        frame = held() if again else held
        if type(frame).__name__ == "_CheckpointFrame":
            return frame, again
    return None, False
