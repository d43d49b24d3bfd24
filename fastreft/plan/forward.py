"""What one forward of a model edits: made once from its inputs by a hook on the model, read by every edited block.

Knows torch and the calling conventions of Transformers' models (4.57 and 5), nothing of PEFT.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import inputs, positions
from .generation import NO_BATCHES, Generate, Run
from .hooks import PerThread, carry_over, checkpointers
from .inputs import Given
from .positions import Tokens
from .spec import Positions, Tied

_NO_LABELS = (
    "this forward in training has no labels, so all of its input is taken as the prompt, the answer too; Trainer keeps them "
    "back for label smoothing and compute_loss_func, and some trainers compute their loss themselves: give the model the "
    "labels as reft_labels as well (a key of the collator's batch)"
)
_NO_PROMPT = (
    "no sample of this batch has a prompt: the labels start at the first token, so nothing is edited; "
    "give prompt tokens the label -100, or use positions='all'"
)


class Plan:
    """What one forward edits. Rows are computed when the first block asks and then shared by all.

    ``tokens`` makes the forward's :class:`Tokens` from (B, S, device); None where all of its tokens are decoded ones.
    """

    length: int | None = None  # S of the tokens or embeddings given, where there are some and they are not decoded ones

    def __init__(
        self,
        owner: nn.Module,
        tokens: Callable[[int, int, torch.device], Tokens] | None = None,
        explicit: Tensor | None = None,
        idle: bool = False,
    ):
        self.owner, self.tokens, self.explicit, self.idle = owner, tokens, explicit, idle
        self._found: dict[Any, list[Tensor | None]] = {}

    def rows(self, spec: Positions, tied: Tied, hidden: Tensor) -> list[Tensor | None]:
        """The rows of each intervention, int64 on the device of ``hidden`` (B, S, d); None for every row."""
        key = (spec, tied, hidden.get_device())
        found = self._found.get(key)
        if found is None:
            found = self._found[key] = self._compute(spec, tied, hidden)
        return found

    def _compute(self, spec: Positions, tied: Tied, hidden: Tensor) -> list[Tensor | None]:
        if self.tokens is None:
            return [None] if spec.everywhere or spec.written else []
        tokens = self.tokens(hidden.shape[0], hidden.shape[1], hidden.device)
        if self.explicit is not None:
            return self._explicit(self.explicit.to(hidden.device), tokens, len(spec.shares(tied)), tied)
        found = positions.rows(spec, tokens, tied, hidden.device)
        return [index if index is None else index.reshape(-1) for index in found]

    def _explicit(self, given: Tensor, tokens: Tokens, groups: int, tied: Tied) -> list[Tensor | None]:
        parts = given if given.ndim == 3 else [given]
        if len(parts) != groups:
            wanted = f"({groups}, batch, n), the positions of each intervention in turn" if groups > 1 else "(batch, n)"
            raise ValueError(f"reft_positions has shape {tuple(given.shape)}; with tied={tied!r} it must be {wanted}")
        return [positions.explicit_rows(index, tokens).reshape(-1) for index in parts]


class Here:
    """What a thread is in."""

    def __init__(self) -> None:
        self.plan: Plan | None = None  # of the forward
        self.run: Run | None = None  # the call of generate
        self.outer: tuple[nn.Module, Tensor | None, Tensor | None, Tensor | None] | None = None  # see carry()


class Shared:
    """What the blocks of one model have in common: the plan, and the hooks that make it."""

    def __init__(self, model: nn.Module, block_names: list[str]):
        self.local = PerThread(Here)
        self.specs: set[Positions] = set()
        self.layers: list[Any] = []  # the ReftLayers that share this
        self.decodes = False  # does any adapter edit decode steps?
        self.two_stacks = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        can_generate = getattr(model, "can_generate", None)
        generates = can_generate is not None and bool(can_generate())
        # Elsewhere labels are not a continuation of the input, so all of it is prompt.
        self.causal = generates and not self.two_stacks
        self.checkpointers = checkpointers(model)
        self.warned: set[str] = set()
        self.handles: list[Any] = [Generate(model, self.local)] if generates else []
        planners, carriers = _entrances(model, block_names, self.two_stacks)
        for modules, begin, end in ((carriers, self.carry, self.put_down), (planners, self.begin, self.end)):
            for module in modules:
                self.handles.append(module.register_forward_pre_hook(begin, with_kwargs=True))
                self.handles.append(module.register_forward_hook(end, always_call=True))

    def add(self, spec: Positions) -> None:
        """Note the positions of an adapter."""
        self.specs.add(spec)
        self.decodes |= spec.everywhere or spec.written

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: Given) -> Any:
        """Make the plan of a forward from its inputs. An inner model called by the outer one leaves it alone."""
        local = self.local.here
        plan, run = local.plan, local.run
        if plan is not None and plan.owner is not module:
            return None
        if run is not None and run.over and kwargs.get("past_key_values") is run.cache:
            if run.step is None or run.step.owner is not module:
                run.step = self._decoding(module, run)
            local.plan = run.step
            return None
        given = inputs.by_name(module, args, kwargs)
        explicit, labels = _taken(given, kwargs)
        if self.two_stacks:
            explicit, labels, run = self._side(given, explicit)
        local.plan = self._plan(module, given, explicit, labels if self.causal or self.two_stacks else None, run)
        if not local.plan.idle:
            shape = inputs.batch_shape(given)
            local.plan.length = None if shape is None else shape[1]
        if torch.is_grad_enabled() and module.training:
            carry_over(self.checkpointers, self.local)
        return args, kwargs

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forget the plan when the forward that made it is over, or has failed."""
        plan = self.local.here.plan
        if plan is not None and plan.owner is module:
            self.local.here.plan = None

    def carry(self, module: nn.Module, args: tuple[Any, ...], kwargs: Given) -> Any:
        """Keep what an encoder-decoder is given for its stacks, which each make a plan of their own."""
        if self.local.here.outer is not None and self.local.here.outer[0] is not module:
            return None
        given = inputs.by_name(module, args, kwargs)
        self.local.here.outer = (module, *_taken(given, kwargs), inputs.attention_mask(given))
        return args, kwargs

    def put_down(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forget it when that forward is over, or has failed."""
        if self.local.here.outer is not None and self.local.here.outer[0] is module:
            self.local.here.outer = None

    def _side(self, given: Given, explicit: Tensor | None) -> tuple[Tensor | None, Tensor | None, Run | None]:
        """What a stack of an encoder-decoder takes of what the whole is given.

        Explicit positions are the encoder's. The decoder's input is the labels, one to the right, or what is generated.
        """
        _, carried, labels, _ = self.local.here.outer or (None, None, None, None)
        run = self.local.here.run
        if given.get("encoder_hidden_states") is not None:
            return explicit, None if labels is None else nn.functional.pad(labels[:, :-1], (1, 0), value=-100), run
        of_generate = None if run is None else run.explicit
        return next((e for e in (explicit, carried, of_generate) if e is not None), None), None, None

    def _plan(
        self, module: nn.Module, given: Given, explicit: Tensor | None, labels: Tensor | None, run: Run | None
    ) -> Plan:
        if "write_index" in given:
            raise ValueError(NO_BATCHES)
        shape, cache = inputs.batch_shape(given), inputs.cache_of(given)
        start = None if run is None or shape is None else run.advance(cache, shape[1])
        if run is not None and start is not None:
            if explicit is None and not self.two_stacks:
                explicit = run.explicit
            if cache is not None and start >= (run.length or 0):
                return self._decoding(module, run)
            if start == 0:  # the mask of the whole prompt: a chunk of it may be padding alone
                self._check_mask(run.mask)
            return Plan(module, lambda b, s, device: run.tokens(b, s, start, device), explicit)
        if explicit is None and inputs.cached_tokens(cache):
            return self._decoding(module, None)
        mask, marks = inputs.attention_mask(given), inputs.marks(given)
        self._check_mask(mask)
        if explicit is not None and shape is not None:
            positions.check_explicit(explicit, shape)
        if mask is None and shape is None and self.local.here.outer is not None and inputs.has_shorter_blocks(module):
            mask = self.local.here.outer[3]  # Whisper's forward keeps it from the encoder, its generate does not

        def tokens(b: int, s: int, device: torch.device) -> Tokens:
            if explicit is not None:
                return Tokens((b, s))
            shown = mask if shape is not None else inputs.shortened(module, mask, s)
            return positions.tokens_of((b, s), shown, labels, *inputs.packing(shown, marks, (b, s)))

        if explicit is None and run is None and not torch.compiler.is_compiling():
            self._warn(module, labels, tokens)
        return Plan(module, tokens, explicit)

    def _check_mask(self, mask: Tensor | None) -> None:
        """Refuse a sample without a token before any block runs; a base whose adapters are disabled takes what it takes."""
        if not torch.compiler.is_compiling() and not all(layer._disable_adapters for layer in self.layers):
            positions.check_mask(mask)

    def _decoding(self, module: nn.Module, run: Run | None) -> Plan:
        """The plan of a forward whose tokens all come after the prompt. Explicit positions of generate are all it edits."""
        only_explicit = run is not None and run.explicit is not None and not self.two_stacks
        return Plan(module, idle=only_explicit or not self.decodes)

    def _warn(
        self, module: nn.Module, labels: Tensor | None, tokens: Callable[[int, int, torch.device], Tokens]
    ) -> None:
        """Say once what else would go wrong in silence: a batch without prompt (one look, as it waits), or without labels."""
        specs = [spec for spec in self.specs if not spec.everywhere]
        what = None
        if labels is not None and specs and _NO_PROMPT not in self.warned:
            batch = tokens(labels.shape[0], labels.shape[1], labels.device)
            found = [batch.written if spec.written else batch.prompt for spec in specs]
            what = None if any(mask is not None and bool(mask.any()) for mask in found) else _NO_PROMPT
            self.warned.add(_NO_PROMPT)
        elif labels is None and specs and self.causal and module.training and torch.is_grad_enabled():
            what = None if _NO_LABELS in self.warned else _NO_LABELS
            self.warned.add(_NO_LABELS)
        if what is not None:
            warnings.warn(what, stacklevel=2)


def _taken(given: Given, kwargs: Given) -> tuple[Tensor | None, Tensor | None]:
    """What is ours among a forward's arguments, taken off them, and the labels, which are also the model's."""
    explicit, labels = kwargs.pop("reft_positions", None), kwargs.pop("reft_labels", None)
    return explicit, given.get("labels") if labels is None else labels


def _entrances(model: nn.Module, block_names: list[str], two_stacks: bool) -> tuple[list[nn.Module], list[nn.Module]]:
    """The modules whose forwards make a plan, and those that carry what an encoder-decoder is given down to its stacks.

    Plans are made by the model and the models within it on the way to the blocks (``LlamaModel``), which can be called
    directly; in an encoder-decoder by the innermost of them, the encoder or the decoder.
    """
    planners: dict[str, None] = {}
    carriers: dict[str, None] = {}
    for name in block_names:
        above = re.split(r"\.\d+(?:\.|$)", name)[0].split(".")
        paths = [".".join(above[:i]) for i in range(1, len(above))]
        inner = [path for path in paths if hasattr(model.get_submodule(path), "main_input_name")]
        if two_stacks and inner:
            planners[inner[-1]] = None
            carriers.update(dict.fromkeys(["", *inner[:-1]]))
        else:
            planners.update(dict.fromkeys(["", *inner]))
    return [model.get_submodule(path) for path in planners], [model.get_submodule(path) for path in carriers]
