"""What a thread is in: forwards within forwards, and a call of ``generate``. Imports torch alone."""

from __future__ import annotations

from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.compiler import is_compiling


class Here:
    """What a thread is in. Plans and what is handed down know the Python frame of their module's call.

    torch tells a hook of the end of a forward that an ``Exception`` stops, and of none that Ctrl-C does (``KeyboardInterrupt``
    is none). So whoever begins something settles first what is over: whose frame is on the stack no more.
    """

    def __init__(self) -> None:
        self.plan: Any = None  # of the forward
        self.run: Any = None  # the call of generate
        self.outer: Any = None  # what the forwards round it hand down
        self.mixed: Any = (
            None  # what edits in place of the active adapters: those that a call names for each sample, or
        )
        self.steered: Any = None  # those of a context with strengths of its own
        self.made = 0  # plans so far
        self.compiled = False  # was the last forward a compiled one, of which no plan is kept?
        # Of calls of generate that write drafts, by the cache that the next goes on with: how long the prompt was.
        self.drafts: WeakKeyDictionary[Any, int | None] = WeakKeyDictionary()
        self.latest: dict[nn.Module, Any] = {}  # the last plans, by the model that made them

    def settle(self, frame: FrameType | None) -> None:
        """Forget the forwards that ``frame`` is not within: they were stopped."""
        if is_compiling():
            return
        plan, outer = self.plan, self.outer
        while plan is not None and not _within(frame, plan.frame):
            plan = plan.outer
        while outer is not None and not _within(frame, outer.frame):
            outer = outer.outer
        self.back(plan, outer)

    def back(self, plan: Any, outer: Any) -> None:
        """Be in what the thread was in before the forwards that were stopped. A plan may be kept; its frame would keep all the
        call had."""
        stopped = self.plan
        while stopped is not None and stopped is not plan:
            stopped.frame, stopped = None, stopped.outer
        self.plan, self.outer = plan, outer


def _within(frame: FrameType | None, call: FrameType | None) -> bool:
    """Is a frame within a call? None, which a step of generate has, is as good as any: generate itself tidies up."""
    while frame is not None and frame is not call and call is not None:
        frame = frame.f_back
    return frame is call or call is None
