"""What ``generate`` knows and a forward does not: which columns are the prompt, and how many have been run already.

A forward sees a part of the sequence: a chunk of the prompt, the tokens after a cache, a few candidates to verify. So a call
of ``generate`` is noted, thread by thread, and its forwards are told apart by counting columns, which costs no look at the
device. Knows torch and the calling conventions of Transformers' generation (4.57 and 5), nothing of PEFT.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.subspaces import Choices
from . import inputs, positions
from .numbers import Numbered, Numbers
from .positions import Tokens
from .said import taken
from .spec import Positions

NO_BATCHES = (
    "continuous batching runs the tokens of several requests in one forward, and no token says whether it is a prompt's: "
    "use generate without cache_implementation='paged'"
)

NO_GUIDANCE = (
    "guidance_scale is given with use_cache=False, where the unconditional forward cannot be told from the prompt's: "
    "leave use_cache at True"
)

NO_LENGTHS = (
    "reft_prompt_lengths is given to an encoder-decoder, whose prompt is all of the encoder's input: leave it out"
)
NO_LABELS = (
    "reft_labels is given to generate, whose input is all before what it writes: give it reft_prompt_lengths, the tokens of "
    "each sample's prompt, where the input holds the beginning of an answer"
)

_SOURCES = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")


class Run:
    """One call of ``generate``: its prompt, and how far its forwards have come.

    The prompt is all of the input, or the first ``lengths`` (B,) tokens of it that are shown, also what a cache handed in
    holds of it: that stays as it was computed, and the rest is edited where the positions of the whole prompt fall on it.
    ``mask`` (B, L) bool shows the prompt, None = all of it; ``length`` L, None = as many columns as the first forward
    has. A decoder's is known once Transformers has made it.
    """

    def __init__(
        self,
        mask: Tensor | None,
        length: int | None,
        cached: int,
        explicit: Tensor | None,
        lengths: Tensor | None,
        subspaces: Choices | None,
    ):
        self.mask, self.length, self.explicit, self.lengths = mask, length, explicit, lengths
        self.subspaces = subspaces  # of each sample, prompt or written
        self.done = cached  # columns that have been run
        self.cache: Any = None  # the one that the sequence is run with, once a forward has shown it
        self.over = False  # has the prompt been run? Then all that comes with this cache is decoded
        self.step: Any = None  # the plan of those forwards, made once
        self.before: Numbers | None = None  # how many tokens the prompts have, where that matters
        self.numbered: Numbered = {}  # which tokens that step edits by their number
        self.shift = 0  # columns that are no token ids of its input: embeddings, or what a cache holds
        self.prepared: dict[str, Any] | None = None  # what its next forward is given, see Prepared
        self.model: Any = None  # whose generate it is

    def owns(self, given: dict[str, Any]) -> bool:
        """Is a forward one of this call's, and not of a callback, a streamer or a processor that asks the model for itself?"""
        if self.prepared is None or self.over:  # with a cache that tells, see advance()
            return True
        # A model in two parts gives its decoder by another name what it is given.
        mine = [value for name in _SOURCES if (value := self.prepared.get(name)) is not None]
        return any(value is source for name in _SOURCES if (value := given.get(name)) is not None for source in mine)

    def begin(self, length: int, mask: Tensor | None) -> None:
        """Take the prompt of a decoder. A draft goes on after one, so that its length is known."""
        if self.length is None:
            self.length, self.mask = length, None if mask is None else mask[:, :length] != 0

    def advance(self, cache: Any, columns: int) -> int | None:
        """The column at which a forward of so many columns starts; None where it is not of this sequence.

        That is so for a forward with another cache, as classifier-free guidance runs beside it.
        """
        if isinstance(cache, (tuple, list)) and cache and isinstance(cache[0], Tensor):
            # XLNet's mems (T, B, d), cut anew for each step: what comes after them is run again, the prompt's last, too.
            return cache[0].shape[0]
        if cache is None and self.cache is None:  # without a cache every forward runs the sequence from its start
            start = 0
        elif self.cache is None or cache is self.cache:
            self.cache, start = cache, self.done
        else:
            return None
        self.done = start + columns
        if self.length is None:
            self.length = self.done
        self.over = cache is not None and self.done >= self.length
        return start

    def at(self, specs: set[Positions], start: int, columns: int) -> Numbered:
        """Which of some decoded columns are edited by their number; the prompts are counted once."""
        if not specs:
            return {}
        if self.before is None:
            shown: Any = self.length or 0
            shown = shown if self.mask is None else self.mask.sum(1)
            written: Any = 0
            if self.lengths is not None:
                own = self.lengths if self.mask is None else self.lengths.to(self.mask.device)
                written = (shown - own).clamp(min=0)
            self.before = Numbers(shown, written)
        return self.before.at(specs, start - (self.length or 0), columns)

    def move(self, specs: set[Positions], start: int, columns: int) -> None:
        """Have the next decode step edit by its numbers; where it edits all that the last did, or nothing, its plan stays."""
        found = self.at(specs, start, columns)
        some = any(isinstance(which, Tensor) for which in (*found.values(), *self.numbered.values()))
        if some or found != self.numbered:
            self.step = None
        self.numbered = found

    def tokens(self, batch: int, columns: int, start: int, device: torch.device) -> Tokens:
        """The tokens of a forward over ``columns`` from ``start``; beams share the mask of their sample."""
        length = self.length or 0
        total = max(length, start + columns)
        mask = None if self.mask is None else self.mask.to(device).repeat_interleave(batch // len(self.mask), 0)
        if self.lengths is None and start == 0 and total == columns == length:
            return Tokens((batch, total), mask)
        if mask is not None:
            mask = nn.functional.pad(mask, (0, total - length), value=True)
        # What is written is what has a label.
        labels = torch.where(torch.arange(total, device=device) < length, -100, 0).expand(batch, total)
        if self.lengths is not None:
            lengths = self.lengths.repeat_interleave(batch // len(self.lengths), 0)
            labels = positions.labels_of(lengths, mask, (batch, total), device)
        return Tokens((batch, total), mask, labels, window=(start, columns))


class Generate:
    """A model's ``generate`` that notes its prompt; takes ``reft_positions`` (B, n), columns of the padded input,
    ``reft_prompt_lengths`` (B,) and ``subspaces``, one choice a sample, too.

    An object and not a function, so that a copy of the model, pickled or not, has one of its own.
    """

    def __init__(self, model: nn.Module, local: Any, numbered: set[Positions]):
        self.model, self.local = model, local
        self.inner = model.__dict__.get("generate")  # somebody else's
        model.__dict__["generate"] = self
        # Its forwards fail in a thread of its own, which logs that and gives the prompts back as if nothing were wrong.
        model.__dict__["init_continuous_batching"] = _refuse_batches
        if hasattr(type(model), Prepared.name) and Prepared.name not in model.__dict__:
            model.__dict__[Prepared.name] = Prepared(model, local, numbered)
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and hasattr(model, DecoderPrompt.name):
            model.__dict__[DecoderPrompt.name] = DecoderPrompt(model, local)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        explicit, answers, lengths, subspaces, _ = taken({}, kwargs)
        if answers is not None:
            raise ValueError(NO_LABELS)
        given = dict(zip(("inputs", "generation_config"), args, strict=False), **kwargs)
        here = self.local.here
        here.settle(sys._getframe())
        if here.run is not None and here.run.model is not self.model:  # a model that has the one within it generate
            explicit = here.run.explicit if explicit is None else explicit
            lengths = here.run.lengths if lengths is None else lengths
            subspaces = here.run.subspaces if subspaces is None else subspaces
        run = _run_of(self.model, given, explicit, lengths, subspaces, here.drafts)
        run.model = self.model
        # What a module round it was given, labels for one, says nothing of what is written.
        (outer_run, here.run), (outer, here.outer), plan = (here.run, run), (here.outer, None), here.plan
        try:
            if self.inner is not None:
                return self.inner(*args, **kwargs)
            return type(self.model).generate(self.model, *args, **kwargs)  # type: ignore[attr-defined]
        finally:
            if _drafts(given) and hasattr(run.cache, "get_seq_length"):
                here.drafts[run.cache] = run.length
            here.run = outer_run
            here.back(plan, outer)

    def remove(self) -> None:
        """Give the model its own ``generate`` back."""
        self.model.__dict__.pop("init_continuous_batching", None)
        for kind in (DecoderPrompt, Prepared):
            if isinstance(self.model.__dict__.get(kind.name), kind):
                del self.model.__dict__[kind.name]
        if self.model.__dict__.get("generate") is self:
            del self.model.__dict__["generate"]
            if self.inner is not None:
                self.model.__dict__["generate"] = self.inner


class Prepared:
    """The method of a model that makes the arguments of generate's forwards, and tells the call of ``generate`` of them.

    It is given the tokens so far, and so knows where a decode step begins, whatever drafts were taken back. ``numbered`` are
    the positions that ask.
    """

    name = "prepare_inputs_for_generation"

    def __init__(self, model: nn.Module, local: Any, numbered: set[Positions]):
        self.model, self.local, self.numbered = model, local, numbered
        self.__signature__ = inspect.signature(getattr(model, self.name))  # generate looks for what it takes

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        made = getattr(type(self.model), self.name)(self.model, *args, **kwargs)
        run = self.local.here.run
        if run is not None:
            run.prepared = made
            if run.over and self.numbered:
                source = next(value for name in _SOURCES if (value := made.get(name)) is not None)
                ids = args[0] if args else kwargs["input_ids"]
                run.move(self.numbered, ids.shape[1] + run.shift - source.shape[1], source.shape[1])
        return made


class DecoderPrompt:
    """The method of an encoder-decoder that makes its decoder's prompt, and tells the call of ``generate`` what it is.

    The first forward would not: with drafts it has more columns than the prompt.
    """

    name = "_prepare_decoder_input_ids_for_generation"

    def __init__(self, model: nn.Module, local: Any):
        self.model, self.local = model, local

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        ids, others = getattr(type(self.model), self.name)(self.model, *args, **kwargs)
        if self.local.here.run is not None:
            self.local.here.run.begin(ids.shape[1], others.get("decoder_attention_mask"))
        return ids, others


def _refuse_batches(*args: Any, **kwargs: Any) -> Any:
    """Always a ``ValueError``, where ``generate_batch`` and its like begin."""
    raise ValueError(NO_BATCHES)


def _drafts(given: dict[str, Any]) -> bool:
    """Does ``generate`` write drafts for another call of it?"""
    return bool(getattr(given.get("generation_config"), "is_assistant", False))


def _run_of(
    model: Any,
    given: dict[str, Any],
    explicit: Tensor | None,
    lengths: Tensor | None,
    subspaces: Choices | None,
    drafts: Mapping[Any, int | None],
) -> Run:
    """What the arguments of ``generate`` say of the prompt. ``drafts``: how long it was, where drafts go on with a cache.
    ``ValueError`` for what cannot be followed."""
    config = given.get("generation_config")
    cacheless = _setting("use_cache", given, config, model) is False
    if cacheless and _setting("guidance_scale", given, config, model) not in (None, 1):
        raise ValueError(NO_GUIDANCE)
    ids = given.get("inputs") if given.get("input_ids") is None else given["input_ids"]
    embedded = given.get("inputs_embeds")
    source = ids if embedded is None else embedded
    cache = inputs.cache_of(given)
    cached = inputs.cached_tokens(cache)
    if lengths is not None and model.config.is_encoder_decoder:
        raise ValueError(NO_LENGTHS)
    if model.config.is_encoder_decoder:  # the sequence is the decoder's, see DecoderPrompt
        mask = length = whole = None
    else:
        mask = given.get("attention_mask")
        if mask is None and embedded is None and ids is not None:
            mask = _mask_of(ids, *(_setting(name, given, config, model) for name in ("pad_token_id", "eos_token_id")))
        whole = source if mask is None else mask
        length = None if whole is None else whole.shape[1]
    if explicit is not None and source is not None:
        positions.check_explicit(explicit, (source.shape[0], length or source.shape[1]))
    if lengths is not None and source is not None:
        shape = (source.shape[0], length or source.shape[1])
        positions.check_lengths(lengths, shape, positions.fitting(mask, shape))
    if subspaces is not None and source is not None:
        subspaces.check(source.shape[0])
    if cached and _drafts(given):
        # A draft goes on: the prompt was the first call's, and what came since has been written.
        known = drafts.get(cache) if hasattr(cache, "get_seq_length") else None
        length = cached if known is None else known
    shown = None if mask is None or length is None else mask[:, :length] != 0
    run = Run(shown, length, cached, explicit, lengths, subspaces)
    if whole is not None:
        run.shift = whole.shape[1] - (0 if ids is None else ids.shape[1])
    return run


def _setting(name: str, given: dict[str, Any], config: Any, model: Any) -> Any:
    """A setting of generation: the call's, its configuration's or the model's."""
    values = (given.get(name), getattr(config, name, None), getattr(model.generation_config, name, None))
    return next((value for value in values if value is not None), None)


def _mask_of(ids: Tensor, pad: Any, eos: Any) -> Tensor | None:
    """What ``generate`` takes for the attention mask where none is given: not the padding, if that is a token apart."""
    ends = [] if eos is None else torch.as_tensor(eos).flatten().tolist()
    return None if pad is None or int(pad) in ends else ids != pad
