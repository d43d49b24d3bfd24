"""What would go wrong without a word: forwards that edit nothing, which are refused in training, or other tokens than meant."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .positions import Tokens
from .spec import Positions

NO_LABELS = (
    "this forward in training has no labels, so all of its input is taken as the prompt, the answer too; Trainer keeps them "
    "back for label smoothing and compute_loss_func, and some trainers compute their loss themselves: give the model the "
    "labels as reft_labels as well (a key of the collator's batch)"
)
NO_LABELS_IN_EVALUATION = (
    "this forward in evaluation has no labels, so all of its input is taken as the prompt, an answer that is scored too: give "
    "the model labels, reft_labels or reft_prompt_lengths (the tokens of each sample's prompt) where there is one"
)
SEVERAL_ANSWERS = (
    "a sample has several answers (labels, then -100, then labels again): the prompt ends where the first begins, while "
    "generate takes all of a conversation for its prompt; make one sample of each answer to train what generate does"
)
NO_PROMPT = (
    "no sample of this batch has a prompt: the labels start at the first token, so nothing is edited; "
    "give prompt tokens the label -100, or use positions='all'"
)
NOTHING = (
    "this forward in training edits nothing: the positions ({}) mean no token of any sample; give the model labels that leave "
    "some of them to the prompt, and an attention_mask that shows them"
)
NOTHING_COMPILED = (
    "this compiled forward in training edits nothing: the positions mean no token of any sample; give the model labels that "
    "leave some of them to the prompt, and an attention_mask that shows them"
)
NOT_RUN = (
    "this forward in training edits nothing: no module that an adapter edits was run, as where encoder_outputs are given, or "
    "layers are left out; edit modules that are run (layers_to_transform, target_modules)"
)
NO_POSITIONS = (
    "reft_positions means no token of any sample, so that this forward, which keeps gradients, edits nothing; leave it out for "
    "the configuration's positions"
)
CACHED = (
    "this forward in training edits nothing: its past_key_values hold tokens, so all of its input is taken for decoded ones; "
    "train without a cache (and without prefix tuning), or with positions='all' or 'decode'"
)
HEADLESS = (
    "input_ids holds several tokens after past_key_values that hold some, and the adapter is on a model without the head that "
    "generates, so that a chunk of the prompt cannot be told from decoded tokens: make the adapter on the whole model"
)
CHUNK = (
    "this forward has several tokens after past_key_values that hold some, outside generate, so they are taken for decoded "
    "ones: a prompt that is run in parts by hand is edited in its first part alone; run it in one, or have generate run it"
)
LENGTHS_AFTER_CACHE = (
    "reft_prompt_lengths is given with past_key_values that hold tokens, after which all of the input is taken for decoded "
    "tokens: leave it out, or give reft_positions"
)
UNCOUNTED = (
    "positions '{}' count the tokens that are written, and this forward comes after past_key_values that no call of generate "
    "made for it, so that nothing says how many were: have generate run it (without guidance_scale), or give reft_positions"
)
ALONE = (
    "{} is run outside its model's forward, so it is not edited: call the model, not its forward method or a part of it"
)


class Silence:
    """What one model has been told; each warning comes once."""

    def __init__(self) -> None:
        self.warned: set[str] = set()
        self.looked = 0  # batches with labels in training
        self.waiting: tuple[Tensor, Any, str] | None = None  # what a GPU has not said yet

    def before(
        self,
        module: nn.Module,
        specs: set[Positions],
        answers: Tensor | None,
        unanswered: bool,
        answered: tuple[int, int] | None,
        tokens: Callable[[int, int, torch.device], Tokens],
    ) -> None:
        """Warn of a batch whose prompt is not what its user may think; ``unanswered``: it has no labels, where they count;
        ``answered`` (B, S): it has, or lengths."""
        self._heard()
        specs = {spec for spec in specs if not spec.everywhere}
        if not specs:
            return
        trains = module.training and torch.is_grad_enabled()
        if unanswered:
            if trains:
                self._warn(NO_LABELS)
            elif not module.training and any(map(ends, specs)):
                self._warn(NO_LABELS_IN_EVALUATION)
        elif answered is not None:
            self.looked += trains
            # A look costs a small model's step some percent: at the first batches, and then ever more seldom.
            looks = (
                trains
                and answers is not None
                and answers.is_cpu
                and self.looked & (self.looked - 1) == 0
                and SEVERAL_ANSWERS not in self.warned
            )
            if looks and answers is not None and _several(answers):
                packed = tokens(len(answers), answers.shape[1], answers.device).starts is not None
                if not packed:  # else they are those of several samples
                    self._warn(SEVERAL_ANSWERS)
            if not trains and NO_PROMPT not in self.warned:  # one look, as it waits for a GPU
                batch = tokens(*answered, torch.device("cpu") if answers is None else answers.device)
                found = [batch.written if spec.written else batch.prompt for spec in specs]
                if not any(mask is not None and bool(mask.any()) for mask in found):
                    warnings.warn(NO_PROMPT, stacklevel=2)
                self.warned.add(NO_PROMPT)

    def chunk(self, specs: set[Positions]) -> None:
        """Warn of several tokens after a cache."""
        if any(not spec.everywhere for spec in specs):
            self._warn(CHUNK)

    def explicit(self, positions: Tensor) -> None:
        """Warn of explicit positions that are none, outside training, where they may be meant."""
        if NO_POSITIONS not in self.warned and positions.is_cpu and not bool((positions >= 0).any()):
            self._warn(NO_POSITIONS)

    def after(self, plan: Any, layers: list[Any]) -> None:
        """``ValueError`` where a forward in training edited no token of its batch; on a GPU, which would wait, a step later.
        ``layers`` are all that may edit."""
        found = [rows for some in plan.asked().values() for rows in some]
        if any(rows is None or rows.is_meta for rows in found):
            return
        if not any(plan.active.values()):
            return self.not_run(plan.owner, layers)
        # Positions that a user gives may be those of padding.
        mask = None if plan.explicit is None or plan.seen is None else plan.seen.mask
        if found and found[0].is_cuda:
            self._ask(torch.stack([_any_shown(rows, mask) for rows in found]).any(), _why(plan))
        elif not any(bool(_any_shown(rows, mask)) for rows in found):
            prompt = None if plan.seen is None or plan.explicit is not None else plan.seen.prompt
            raise ValueError(_why(plan) if prompt is None or bool(prompt.any()) else NO_PROMPT)

    def not_run(self, module: nn.Module, layers: list[Any]) -> None:
        """``ValueError`` where a module that is run in training holds active ``layers``, none of which was run."""
        layers = [layer for layer in layers if not layer._disable_adapters and layer.active_adapters]
        if layers and set(layers) & set(module.modules()):
            raise ValueError(NOT_RUN)

    def _warn(self, what: str) -> None:
        if what not in self.warned:
            self.warned.add(what)
            warnings.warn(what, stacklevel=2)

    def _ask(self, edits: Tensor, why: str) -> None:
        """Have a GPU say later whether it edits anything."""
        if self.waiting is None and not torch.cuda.is_current_stream_capturing():
            host = torch.empty((), dtype=torch.bool, device="cpu", pin_memory=True)  # whatever the default device
            host.copy_(edits, non_blocking=True)
            said = torch.cuda.Event()
            said.record()
            self.waiting = host, said, why

    def _heard(self) -> None:
        """``ValueError`` where a GPU has said that an earlier forward edited nothing."""
        if self.waiting is not None and self.waiting[1].query():
            (host, _, why), self.waiting = self.waiting, None
            if not bool(host):
                raise ValueError(why)

    def __getstate__(self) -> dict[str, Any]:
        return {"warned": self.warned, "looked": self.looked, "waiting": None}


def unanswered(module: nn.Module, counts: bool, ends: bool) -> None:
    """Warn, while it is compiled, of a forward without labels, where some positions count from the prompt, or its end."""
    if counts and module.training and torch.is_grad_enabled():
        _say(NO_LABELS)
    elif ends and not module.training:
        _say(NO_LABELS_IN_EVALUATION)


@torch.compiler.assume_constant_result
def _say(what: str) -> bool:
    """A warning while a forward is compiled."""
    warnings.warn(what, stacklevel=2)
    return True


def ends(spec: Positions) -> bool:
    """Do positions depend on where the prompt ends?"""
    return not spec.everywhere and bool(spec.last or not spec.places)


def refuse_compiled(why: str) -> None:
    """Have the forward that is compiled raise a ``RuntimeError``: an exception in a hook would be lost with the graph."""
    torch._assert_async(torch.zeros((), dtype=torch.bool), why)


def compiled(plan: Any) -> None:
    """Have a compiled forward in training raise a ``RuntimeError`` where it edits no token of its batch. On a CPU: on a GPU, an
    operation that raises spoils all that comes after it."""
    found = [rows for some in plan.asked().values() for rows in some]
    if found and all(rows is not None and rows.is_cpu for rows in found):
        mask = None if plan.explicit is None or plan.seen is None else plan.seen.mask
        torch._assert_async(torch.stack([_any_shown(rows, mask) for rows in found]).any(), NOTHING_COMPILED)


def _any_shown(rows: Tensor, mask: Tensor | None) -> Tensor:
    """Is one of some rows (-1 = none) a token that a mask (B, S) shows? Bool ()."""
    listed = rows >= 0
    if mask is not None:
        listed = listed & (mask != 0).to(rows.device).flatten()[rows.clamp(min=0)]
    return listed.any()


def _why(plan: Any) -> str:
    return NOTHING.format(", ".join(sorted({str(spec) for spec, _ in plan.asked()})))


def alone(block: nn.Module) -> bool:
    """Warn of a block that is run by itself, where it has an active adapter, and say whether it has."""
    layer: Any = block._modules.get("reft")
    if layer is None or not layer.active_adapters or layer._disable_adapters:
        return False
    warnings.warn(ALONE.format(layer.name), stacklevel=2)
    return True


def _several(labels: Tensor) -> bool:
    """Has a sample labels, none, and labels again?"""
    labelled = labels != -100
    return bool(((labelled[:, 1:] & ~labelled[:, :-1]).sum(1) + labelled[:, 0] > 1).any())
