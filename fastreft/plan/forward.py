"""What one forward of a model edits: made once from its inputs by a hook on the model, read by every edited block.

Knows torch and the calling conventions of Transformers' models (4.57 and 5), nothing of PEFT.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from ..ops.edit import NEW, WHERE_ALLOWED
from ..ops.subspaces import Choices
from . import entrances, inputs, numbers, positions, silence, subspaces
from .asked import Asked, Outer
from .entrances import LM, OTHER, Entrance
from .generation import NO_BATCHES, NO_LENGTHS, Generate, Run
from .here import Here
from .hooks import PerThread, traced, unseen
from .inputs import Given
from .numbers import Numbered
from .past import FORGOTTEN, Past
from .positions import Tokens
from .said import NAMES, taken
from .silence import Silence
from .spec import Positions, Tied


class Plan:
    """What one forward edits. Rows are computed when the first block asks and then shared by all.

    ``tokens`` makes the forward's :class:`Tokens` from (B, S, device); None where all of its tokens are decoded ones.
    """

    length: int | None = None  # S of the tokens or embeddings given, where there are some and they are not decoded ones
    training = False  # is it a forward of training, which must edit something?
    over = False
    where = WHERE_ALLOWED  # a fresh hidden state may be edited in place
    began: int | None = None  # autograd's number at the start, where a backward may recompute it
    outer: Plan | None = None  # of the model within which this forward runs
    mixed: Any = None  # the adapters of each sample, where the call named them
    subspaces: Choices | None = None  # the rows of an edit that each sample has, where they were given
    frame: FrameType | None = None  # of its module's call, while that lasts, see Here

    def __init__(
        self,
        owner: nn.Module,
        tokens: Callable[[int, int, torch.device], Tokens] | None = None,
        explicit: Tensor | None = None,
        idle: bool = False,
        numbered: Numbered | None = None,
    ):
        self.owner, self.tokens, self.explicit, self.idle = owner, tokens, explicit, idle
        self.numbered = numbered or {}  # of decoded tokens: which of them are edited by their number
        self.seen: Tokens | None = None  # once a block has asked
        # The adapters that each block had in this forward, by block; None for the one plan of many decode steps.
        self.active: dict[nn.Module, tuple[str, ...]] | None = None if tokens is None else {}
        self._found: dict[Any, list[Tensor | None]] = {}
        self.kept: dict[Any, Any] = {}  # what else blocks have worked out and share

    def rows(self, spec: Positions, tied: Tied, hidden: Tensor) -> list[Tensor | None]:
        """The rows of each intervention, int64 on the device of ``hidden`` (B, S, d); None for every row."""
        key = (spec, tied, hidden.get_device())
        found = self._found.get(key)
        if found is None:
            with unseen():
                found = self._found[key] = self._compute(spec, tied, hidden)
        return found

    def asked(self) -> dict[tuple[Positions, Tied], list[Tensor | None]]:
        """The rows that blocks have asked for so far, by the kind of adapter; those of several devices are the same."""
        return {(spec, tied): rows for (spec, tied, _), rows in self._found.items()}

    def _compute(self, spec: Positions, tied: Tied, hidden: Tensor) -> list[Tensor | None]:
        if self.tokens is None:
            return self._decoded(spec, hidden)
        self.seen = tokens = self.tokens(hidden.shape[0], hidden.shape[1], hidden.device)
        if self.explicit is not None:
            return self._explicit(self.explicit.to(hidden.device), tokens, len(spec.shares(tied)), tied)
        found = positions.rows(spec, tokens, tied, hidden.device)
        return [index if index is None else index.reshape(-1) for index in found]

    def _decoded(self, spec: Positions, hidden: Tensor) -> list[Tensor | None]:
        if not spec.numbered:
            return [None] if spec.everywhere or spec.written else []
        if spec not in self.numbered:
            if is_compiling():
                silence.refuse_compiled(silence.UNCOUNTED.format(spec))
                return []
            raise ValueError(silence.UNCOUNTED.format(spec))
        found = numbers.rows(spec, self.numbered[spec], (hidden.shape[0], hidden.shape[1]), hidden.device)
        return [index if index is None else index.reshape(-1) for index in found]

    def _explicit(self, given: Tensor, tokens: Tokens, groups: int, tied: Tied) -> list[Tensor | None]:
        parts = given if given.ndim == 3 else [given]
        if len(parts) != groups:
            wanted = f"({groups}, batch, n), the positions of each intervention in turn" if groups > 1 else "(batch, n)"
            raise ValueError(f"reft_positions has shape {tuple(given.shape)}; with tied={tied!r} it must be {wanted}")
        return [positions.explicit_rows(index, tokens).reshape(-1) for index in parts]


class Shared:
    """What the blocks of one model have in common: the plan, and the hooks that make it."""

    def __init__(self, model: nn.Module, block_names: list[str]):
        self.local = PerThread(Here, Past(silence.alone))
        self.specs: set[Positions] = set()
        self.numbered: set[Positions] = set()  # of them, those that ask for a token's number
        self.layers: list[Any] = []  # the ReftLayers that share this
        self.decodes = False  # does any adapter edit all decode steps?
        self.counts = self.ends = False  # does one ask where the prompt is, does one edit its end?
        self.grouped = False  # has one subspaces, of which training is to say which?
        self.silence = Silence()
        self.handles: list[Any] = []
        self.entered: set[str] = set()
        self.enter(model, block_names)

    def enter(self, model: nn.Module, block_names: list[str]) -> None:
        """Hang the hooks that make the plans of some blocks, where they do not hang yet."""
        planners, carriers = entrances.entrances(model, block_names)
        hooks: list[tuple[Entrance, Any, Any]] = [(entrance, self.carry, self.put_down) for entrance in carriers]
        for entrance in planners:
            backwards_only = entrances.attends_backwards_only(model.get_submodule(entrance.name))
            hooks.append((entrance, partial(self.begin, causal=backwards_only), self.end))
        for entrance, before, after in hooks:
            if entrance.name in self.entered:
                continue
            self.entered.add(entrance.name)
            module = model.get_submodule(entrance.name)
            if entrance.kind is LM:
                self.handles.append(Generate(module, self.local, self.numbered))
            self.handles.append(module.register_forward_pre_hook(partial(before, entrance), with_kwargs=True))
            self.handles.append(module.register_forward_hook(after, always_call=True))

    def take_off(self) -> None:
        """Take the hooks off, once no block is left."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.entered.clear()

    def add(self, spec: Positions, grouped: bool = False) -> None:
        """Note the positions of an adapter, and that it has subspaces."""
        self.grouped |= grouped
        self.specs.add(spec)
        if spec.numbered:
            self.numbered.add(spec)
        else:
            self.decodes |= spec.everywhere or spec.written
        self.counts |= not spec.everywhere
        self.ends |= silence.ends(spec)

    # ---- hooks ------------------------------------------------------------------------------------------------------

    def carry(self, entrance: Entrance, module: nn.Module, args: tuple[Any, ...], kwargs: Given) -> Any:
        """Keep what a model is given for the one within it that makes the plan."""
        here = self.local.here
        run = here.run
        if run is not None and run.over and kwargs.get("past_key_values") is run.cache:
            return None  # a decode step, to which nothing of it matters
        if here.plan is not None or here.outer is not None:
            here.settle(_call())
        made = -1  # a compiled frame that saw a number count would be compiled again
        if not is_compiling():
            made, here.compiled = here.made, False
        given = inputs.by_name(module, args, kwargs)
        foreign = entrance.kind is LM and run is not None and not run.owns(given)
        here.outer = Outer(module, entrance.kind, taken(given, kwargs), given, foreign, here.outer, _call(), made)
        return args, kwargs

    def put_down(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forget it when that forward is over, or has failed."""
        outer = self.local.here.outer
        while outer is not None and outer.module is not module:  # those within it that were stopped
            outer = outer.outer
        if outer is None:
            return
        self.local.here.outer = outer.outer
        if traced() or outer.kind is OTHER or output is None:
            return
        here = self.local.here
        if outer.made == here.made and not here.compiled and module.training and torch.is_grad_enabled():
            self.silence.not_run(module, self.layers)

    def begin(
        self, entrance: Entrance, module: nn.Module, args: tuple[Any, ...], kwargs: Given, *, causal: bool
    ) -> Any:
        """Make the plan of a forward from its inputs."""
        here = self.local.here
        if here.plan is not None or here.outer is not None:
            here.settle(_call())
        run, outer_plan = here.run, here.plan
        if run is not None and run.over and kwargs.get("past_key_values") is run.cache:
            if self.numbered and run.prepared is None:  # a generate of the model's own, without drafts
                shape = inputs.batch_shape(inputs.by_name(module, args, kwargs))
                run.move(self.numbered, run.done, shape[1] if shape else 1)
                run.done += shape[1] if shape else 1
            if run.step is None or run.step.owner is not module:
                run.step = self._decoding(module, run, entrance.in_stacks, run.numbered)
                run.step.mixed, run.step.subspaces = here.mixed, run.subspaces
            run.step.outer, here.plan = outer_plan, run.step
            return None
        given = inputs.by_name(module, args, kwargs)
        said = taken(given, kwargs)
        given = inputs.flattened(given)
        outer = [] if here.outer is None else here.outer.chain()
        if run is not None and (any(o.foreign for o in outer) or (entrance.kind is LM and not run.owns(given))):
            run = None
        asked = Asked(module, entrance, given, said, outer, run, causal)
        if is_compiling():
            here.plan = self._compiled(asked)
        elif traced():
            here.plan = self._plan(asked)
        else:
            here.plan = self._noted(asked)
        plan = here.plan
        if here.mixed is not None:
            plan.mixed = here.mixed
        if plan.subspaces is None:  # else it is one that is recomputed
            plan.subspaces = subspaces.of_forward(asked, plan, self)
        if not is_compiling():
            here.made += 1
            if torch._C._len_torch_dispatch_stack():
                plan.where = NEW  # a selective checkpoint, for one, keeps results, which must stay as they are
        if not plan.idle:
            plan.length = _length(given)
        plan.outer, plan.frame = outer_plan, _call()
        return args, kwargs

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forget the plan when the forward that made it is over, or has failed."""
        here = self.local.here
        plan = here.plan
        while plan is not None and plan.owner is not module:  # those within it that were stopped
            plan = plan.outer
        if plan is None:
            return
        here.plan, plan.frame = plan.outer, None
        if output is None:
            return
        if plan.training and is_compiling():
            silence.compiled(plan)
        if plan.began is None or traced():
            return
        plan.over = True
        self.local.past.note(plan, plan.began, output)
        if plan.training:
            with unseen():
                self.silence.after(plan, self.layers)

    # ---- the plan ---------------------------------------------------------------------------------------------------

    def _noted(self, asked: Asked) -> Plan:
        """The plan of a forward that may be recomputed, or of one that recomputes it."""
        module, regions = asked.module, self.local.past.regions
        self.local.here.compiled = False
        trains = module.training and torch.is_grad_enabled()
        noted = module.training or torch.is_grad_enabled()
        plan = regions.again(module)
        if plan is None or plan.length != _length(asked.given):
            if noted and (wanting := regions.wanting(module, asked.said, [o.said for o in asked.outer])):
                raise RuntimeError(
                    FORGOTTEN.format(f"a {type(module).__name__}", ", ".join(NAMES[name] for name in wanting))
                )
            with unseen():
                plan = self._plan(asked)
            if trains and plan.idle and not self._all_disabled():
                raise ValueError(silence.CACHED)
            plan.training = trains
            self.local.here.latest[module] = plan
        regions.enter(plan)
        if noted:
            plan.began = torch.autograd._get_sequence_nr()
        return plan

    def _compiled(self, asked: Asked) -> Plan:
        """The plan of a forward that is compiled; what can be said of it is said then."""
        plan = self._plan(asked)
        plan.training = asked.module.training and torch.is_grad_enabled()
        if plan.training and plan.idle and not self._all_disabled():
            silence.refuse_compiled(silence.CACHED)
        self.local.here.compiled = True
        return plan

    def _plan(self, asked: Asked) -> Plan:
        module, given, run = asked.module, asked.given, asked.run
        in_stacks = asked.entrance.in_stacks
        if "write_index" in given:
            raise ValueError(NO_BATCHES)
        shape, cache = inputs.batch_shape(given), inputs.cache_of(given)
        explicit, lengths, answers = asked.first("explicit"), asked.first("lengths"), asked.answers(shape)
        if in_stacks:
            if lengths is not None:
                raise ValueError(NO_LENGTHS)
            explicit, answers, run = asked.side(explicit, answers)
        start = None if run is None or shape is None else run.advance(cache, shape[1])
        if run is not None and start is not None:
            if explicit is None and not in_stacks:
                explicit = run.explicit
            if cache is not None and start >= (run.length or 0):
                found = run.at(self.numbered, start, shape[1])  # type: ignore[index]
                return self._decoding(module, run, in_stacks, found)
            if start == 0:  # the mask of the whole prompt: a chunk of it may be padding alone
                self._check_mask(run.mask)
            return Plan(module, lambda b, s, device: run.tokens(b, s, start, device), explicit)
        cached = 0 if explicit is not None else inputs.cached_tokens(cache)
        if cached:
            if lengths is not None:
                raise ValueError(silence.LENGTHS_AFTER_CACHE)
            if shape is not None and shape[1] > 1:
                if asked.headless():
                    raise ValueError(silence.HEADLESS)
                if run is None and not traced():
                    self.silence.chunk(self.specs)
            found = {}
            if self.numbered and shape is not None:
                found = numbers.after_cache(self.numbered, asked.mask(shape), cached, shape)
            return self._decoding(module, None, in_stacks, found)
        mask, marks = asked.mask(shape), asked.marks(shape)
        self._check_mask(mask)
        if shape is not None and not in_stacks:
            asked.check(shape)
        if shape is not None and explicit is not None:
            positions.check_explicit(explicit, shape)

        def tokens(b: int, s: int, device: torch.device) -> Tokens:
            shown = mask if shape is not None else inputs.shortened(module, mask, s)
            if lengths is not None:
                positions.check_lengths(lengths, (b, s))
            labels = answers if lengths is None else positions.labels_of(lengths, shown, (b, s), device)
            if explicit is not None:  # of masks and labels that do not fit it needs none
                return Tokens((b, s), positions.fitting(shown, (b, s)), positions.fitting(labels, (b, s)))
            starts, sequences = inputs.packing(shown, marks, (b, s))
            if lengths is not None and starts is not None and not traced() and bool(starts[:, 1:].any()):
                raise ValueError(positions.PACKED)
            return positions.tokens_of((b, s), shown, labels, starts, sequences)

        if shape is not None and lengths is not None:
            tokens(*shape, lengths.device if isinstance(lengths, Tensor) else torch.device("cpu"))  # says what is wrong
        if explicit is not None and not module.training and torch.is_grad_enabled() and not traced():
            self.silence.explicit(explicit)
        if explicit is None and run is None:
            unanswered = answers is None and lengths is None and asked.continues()
            if not traced():
                answered = shape if answers is not None or lengths is not None else None
                self.silence.before(module, self.specs, answers, unanswered, answered, tokens)
            elif unanswered and is_compiling():
                silence.unanswered(module, self.counts, self.ends)
        return Plan(module, tokens, explicit)

    def _check_mask(self, mask: Tensor | None) -> None:
        """Refuse a sample without a token before any block runs; a base whose adapters are disabled takes what it takes."""
        if not traced() and not self._all_disabled():
            positions.check_mask(mask)

    def _all_disabled(self) -> bool:
        return all(layer._disable_adapters for layer in self.layers)

    def _decoding(self, module: nn.Module, run: Run | None, in_stacks: bool, found: Numbered) -> Plan:
        """The plan of a forward whose tokens all come after the prompt. Explicit positions of generate are all it edits."""
        only_explicit = run is not None and run.explicit is not None and not in_stacks
        edits = self.decodes or any(found.get(spec) is not False for spec in self.numbered)
        return Plan(module, idle=only_explicit or not edits, numbered=found)


def _length(given: Given) -> int | None:
    """S of the tokens or embeddings given, where there are some."""
    shape = inputs.batch_shape(given)
    return None if shape is None else shape[1]


def _call() -> FrameType | None:
    """The frame of the module's call that runs the hook that asks; a compiler's look has none."""
    return None if is_compiling() else sys._getframe(2)
