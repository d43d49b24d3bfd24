"""How a plan reaches the modules of its forward: what each thread is in, and the hooks that hand a module's hidden state to
whoever edits it. A block that a backward recomputes gets the plan of its own forward, see ``past.py``. Imports torch alone.

A plan is any object with ``idle``: does the forward under way edit nothing? Then the hooks do nothing, and count as none.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.utils._python_dispatch import _disable_current_modes

from .past import Past

Edit = Callable[[nn.Module, Any, Tensor], Tensor]
"""(module, plan, hidden) -> the hidden state as it is to be: ``hidden`` itself where it was edited in place, or not at all."""


def traced() -> bool:
    """Is this a compiler's look at the program, a transform's (vmap and its like), or one without memory (``FakeTensorMode``),
    where no tensor has a value?"""
    if is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    return bool(torch._C._len_torch_dispatch_stack()) and _FAKE() is not None


_FAKE = partial(torch._C._get_dispatch_mode, torch._C._TorchDispatchModeKey.FAKE)


def unseen() -> AbstractContextManager[Any]:
    """A context whose operations no dispatch mode sees: a selective checkpoint, for one, counts those of a forward, and a
    recomputation has the rows already. What is traced keeps its modes."""
    if is_compiling() or not torch._C._len_torch_dispatch_stack() or traced():
        return nullcontext()
    return _disable_current_modes()


class PerThread(threading.local):
    """``here``, an object of each thread's own: servers run several forwards of a model at once. ``past`` is common to them.

    The state is an object in here, and not in this one's attributes, as a compiled frame that changes those loses the change.
    """

    def __init__(self, make: Callable[[], Any], past: Past):
        self.make, self.here, self.past = make, make(), past

    def __reduce__(self) -> tuple[type[PerThread], tuple[Callable[[], Any], Past]]:
        return PerThread, (self.make, self.past)  # a copy of the model starts with no forward under way


# ---- hooks on a module ---------------------------------------------------------------------------------------------

# Where a module keeps the hooks that get its input, and those that get its output.
_KEPT = {True: "_forward_pre_hooks", False: "_forward_hooks"}


class HooksWithWork(OrderedDict[int, Any]):
    """A module's hooks; false while ours is the only one and this thread's forward edits nothing, as a decode step does.

    ``nn.Module`` asks for their truth at each call, and where it finds none takes a shorter way, which saves several
    microseconds a block. Who asks for longer than a call, the compiler first of all, asks for their number.
    """

    own: tuple[Any, int | None] = (None, None)  # what each thread is in, and the key of our hook

    def __bool__(self) -> bool:
        local, ours = self.own
        number = len(self)
        if number != 1 or ours not in self:
            return number > 0
        plan = local.here.plan
        return local.past.asks if plan is None else not plan.idle


def hang(
    module: nn.Module, local: PerThread, edit: Edit, *, at_input: bool, prepend: bool = False, look: bool = False
) -> Any:
    """Have ``edit`` given the module's hidden state, of its input or its output, by each forward that has a plan; the hook's
    handle. With ``prepend`` an output's hook comes before others', who then see the edited state, as later modules do, but
    behind those that were hung so before it. With ``look`` an output that is not the module's own is edited in a copy: it may
    be its input, or kept for its backward.
    """
    hooks = HooksWithWork()
    if not len(getattr(module, _KEPT[at_input])):  # else the handles of others' hooks would lose what they are in
        setattr(module, _KEPT[at_input], hooks)
    if at_input:
        handle = module.register_forward_pre_hook(partial(_edit_input, local, edit), with_kwargs=True)
    elif look:
        handle = module.register_forward_hook(partial(_edit_apart, local, edit), prepend=prepend, with_kwargs=True)
    else:
        handle = module.register_forward_hook(partial(_edit_output, local, edit), prepend=prepend)
    hooks.own = local, handle.id
    if prepend and not at_input:
        kept = module._forward_hooks
        before = takewhile(lambda key: _is_edit(kept[key]), [key for key in kept if key != handle.id])
        for key in reversed([*before]):
            kept.move_to_end(key, last=False)  # type: ignore[attr-defined]
    return handle


def _is_edit(hook: Any) -> bool:
    return isinstance(hook, partial) and hook.func in (_edit_output, _edit_apart)


def take_down(module: nn.Module, handle: Any, *, at_input: bool) -> None:
    """Take our hook off, and its mapping where nobody else's hook is in it: a pickled base needs nothing of ours."""
    handle.remove()
    hooks = getattr(module, _KEPT[at_input])
    if isinstance(hooks, HooksWithWork) and not len(hooks):
        setattr(module, _KEPT[at_input], OrderedDict())


# A decode step goes no further than its plan: what it costs is measured against 2% of a small model's step.


def _edit_output(local: PerThread, edit: Edit, module: nn.Module, args: Any, output: Any) -> Any:
    """The forward hook: the module's output with another hidden state; None where that is the same."""
    plan = local.here.plan
    if plan is None:
        plan = local.past.find(module)
    if plan is None or plan.idle:
        return None
    given = output if isinstance(output, Tensor) else _first(output)
    hidden = edit(module, plan, given)
    if hidden is given:
        return None
    return hidden if isinstance(output, Tensor) else _with_first(output, hidden)


def _edit_apart(local: PerThread, edit: Edit, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """The forward hook of a module whose output may not be its own: a copy is edited then."""

    def apart(module: nn.Module, plan: Any, given: Tensor) -> Tensor:
        kept = not traced() and _is_kept(given, (*args, *kwargs.values()))
        return edit(module, plan, given.clone() if kept else given)

    return _edit_output(local, apart, module, args, output)


def _is_kept(given: Tensor, inputs: tuple[Any, ...]) -> bool:
    """Is an output in the memory of an input, several times in its own, or kept by autograd as the result of an operation?"""
    if 0 in given.stride():
        return True
    for tensor in (given, given._base) if given._is_view() else (given,):
        node = None if tensor is None else tensor.grad_fn
        if isinstance(node, torch.autograd.function.BackwardCFunction):  # somebody's, which may keep what it likes
            return True
        if any(hasattr(type(node), name) for name in ("_saved_result", "_saved_output")):
            return True
    memory = given.untyped_storage().data_ptr()
    return any(isinstance(t, Tensor) and t.untyped_storage().data_ptr() == memory for t in inputs)


def _edit_input(local: PerThread, edit: Edit, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The forward pre-hook: the module's arguments with another hidden state, which is the first tensor of them."""
    plan = local.here.plan
    if plan is None:
        plan = local.past.find(module)
    if plan is None or plan.idle:
        return None
    if args:
        return (edit(module, plan, args[0]), *args[1:]), kwargs
    name = next(name for name, value in kwargs.items() if isinstance(value, Tensor) and value.is_floating_point())
    return args, kwargs | {name: edit(module, plan, kwargs[name])}


def _first(output: Any) -> Tensor:
    """The hidden state of an output that holds more: its first entry."""
    if isinstance(output, dict):
        return next(iter(output.values()))
    return getattr(output, dataclasses.fields(output)[0].name) if dataclasses.is_dataclass(output) else output[0]


def _with_first(output: Any, hidden: Tensor) -> Any:
    """The output with another first entry."""
    if isinstance(output, dict):
        output[next(iter(output))] = hidden
        return output
    if dataclasses.is_dataclass(output):
        return dataclasses.replace(output, **{dataclasses.fields(output)[0].name: hidden})  # type: ignore[type-var]
    entries = (hidden, *output[1:])
    return type(output)(*entries) if hasattr(output, "_fields") else type(output)(entries)
