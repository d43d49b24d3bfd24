"""What a forward was given, by itself and through the models round it, as far as it decides which tokens are edited."""

from __future__ import annotations

from types import FrameType
from typing import Any, NamedTuple

from torch import Tensor, nn

from . import inputs
from .entrances import LM, MODEL, OTHER, Entrance
from .generation import Run
from .inputs import Given
from .said import NAMES, Said


class Outer(NamedTuple):
    """A forward round the one that makes the plan, and what it hands down."""

    module: nn.Module
    kind: str
    said: Said
    given: Given
    foreign: bool  # within a call of generate, but not one of its own forwards: somebody's callback
    outer: Outer | None
    frame: FrameType | None  # of the module's call, see Here
    made: int  # how many plans its thread had made

    def chain(self) -> list[Outer]:
        """From this one outwards."""
        return [self, *(self.outer.chain() if self.outer is not None else [])]


class Asked(NamedTuple):
    """A forward that makes a plan; ``outer`` are those round it, the innermost first. ``causal``: do its tokens see what is
    before them alone?"""

    module: nn.Module
    entrance: Entrance
    given: Given
    said: Said
    outer: list[Outer]
    run: Run | None
    causal: bool

    # Not properties: the compiler of torch 2.10 does not follow those of a NamedTuple.
    def continues(self) -> bool:
        """Would labels be a continuation of the input? Not those of a classifier."""
        kinds = [self.entrance.kind, *(o.kind for o in self.outer)]
        return not self.entrance.in_stacks and (LM in kinds or self.headless())

    def headless(self) -> bool:
        """Is it a decoder whose head, if it has one, is none of Transformers' that we know of?"""
        return self.causal and not self.entrance.in_stacks and all(o.kind is OTHER for o in self.outer)

    def first(self, name: str) -> Any:
        """What the innermost of the forwards says of something; None where none does."""
        values = (getattr(said, name) for said in (self.said, *(o.said for o in self.outer)))
        return next((value for value in values if value is not None), None)

    def check(self, shape: tuple[int, int]) -> None:
        """``ValueError`` where what counts the tokens of a batch was given to a module round it that has other tokens, as
        where that puts a prompt of its own before them, or has other tokens than there are."""
        for name in ("explicit", "lengths"):
            teller = None if getattr(self.said, name) is not None else self._teller(name)
            theirs = None if teller is None else inputs.batch_shape(inputs.flattened(teller.given))
            if teller is not None and theirs is not None and theirs[1] != shape[1]:
                raise ValueError(
                    f"{NAMES[name]} counts the {theirs[1]} tokens a sample that the {type(teller.module).__name__} is given, "
                    f"which runs a {type(self.module).__name__} with {shape[1]}: have it give that model {NAMES[name]} itself"
                )
        answers = self.first("answers") if self.continues() else None
        if answers is not None and tuple(answers.shape) != shape:
            raise ValueError(
                f"reft_labels has shape {tuple(answers.shape)}; it must have one entry a token, here {shape}"
            )

    def _teller(self, name: str) -> Outer | None:
        """The innermost of those round it that was given something."""
        return next((o for o in self.outer if getattr(o.said, name) is not None), None)

    def answers(self, shape: tuple[int, int] | None) -> Tensor | None:
        """Labels (B, S), one a token: ``reft_labels``, else those of a language model, or of somebody's module that computes
        its loss itself. Elsewhere labels are something else, and all of the input is prompt."""
        given = self.first("answers")
        if given is not None:
            return given if self.continues() or self.entrance.in_stacks else None
        own = [(self.entrance.kind, self.said), *((o.kind, o.said) for o in self.outer)]
        kind, given = next(((kind, said.labels) for kind, said in own if said.labels is not None), (MODEL, None))
        if kind is MODEL or (kind is OTHER and (not isinstance(given, Tensor) or tuple(given.shape) != shape)):
            return None  # labels of classes, or of another call
        return given if self.continues() or self.entrance.in_stacks else None

    def side(self, explicit: Tensor | None, answers: Tensor | None) -> tuple[Tensor | None, Tensor | None, Run | None]:
        """What a stack of an encoder-decoder takes of what the whole is given: positions, labels, the call of generate.

        Explicit positions are the encoder's. The decoder's input is the labels, one to the right, or what is generated.
        """
        if self.given.get("encoder_hidden_states") is None:
            of_generate = None if self.run is None else self.run.explicit
            return of_generate if explicit is None else explicit, None, None
        if answers is not None:
            answers = nn.functional.pad(answers[:, :-1], (1, 0), value=-100)
        return self.said.explicit, answers, self.run

    def mask(self, shape: tuple[int, int] | None) -> Tensor | None:
        """The attention mask, (B, S) where somebody has it so: a model may hand another form of it to the one within it."""
        own = inputs.attention_mask(self.given)
        if own is None and shape is None and inputs.has_shorter_blocks(self.module) and self.outer:
            return inputs.attention_mask(self.outer[0].given)  # Whisper's forward keeps it from the encoder
        if (own is not None and own.ndim == 2) or self.entrance.in_stacks:
            return own
        around = (inputs.attention_mask(o.given) for o in self._alike(shape))
        return next((mask for mask in around if mask is not None and mask.ndim == 2), own)

    def marks(self, shape: tuple[int, int] | None) -> tuple[Tensor | None, ...]:
        """What can say that sequences are packed, see :func:`inputs.marks`."""
        own = inputs.marks(self.given)
        if any(mark is not None for mark in own) or self.entrance.in_stacks:
            return own
        around = (inputs.marks(o.given) for o in self._alike(shape))
        return next((marks for marks in around if any(mark is not None for mark in marks)), own)

    def _alike(self, shape: tuple[int, int] | None) -> list[Outer]:
        """The models of Transformers round it that have as many samples and tokens."""
        return [o for o in self.outer if o.kind is not OTHER and inputs.batch_shape(o.given) == shape]
