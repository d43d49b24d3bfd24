"""A learning rate that suits a model and an adapter, found by a step or two on random tokens.

Adam's first step moves every trained number by the rate, in its gradient's direction. What that does to the model depends on
its width, its depth, the scale of its hidden states, the rank, the layers and the positions, and is measured here: the rate
at which such a step, towards some random change of the last hidden state, moves that state by a given part of its length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..interventions import orthonormal_parameters
from .config import ReftConfig
from .loading import layers_of

# Parts of the last hidden state's length, which suit models of several widths and depths (docs/tasks.md): for the tokens that a
# model writes, and, three times that, for all that a model reads, each edited itself.
MOVE, MOVE_EDITED = 0.1, 0.3
TOKENS, SAMPLES = 48, 4
_STEPS, _NEAR = 6, 0.02
_NO_CHANGE = "a step changes no hidden state behind the prompt, so that no rate can be told from another"


def suggest_lr(
    model: nn.Module,
    config: ReftConfig | None = None,
    inputs: Mapping[str, Tensor] | None = None,
    *,
    move: float | None = None,
) -> float:
    """The learning rate for ``model`` with an adapter of ``config``, or as it is where that is None and it has one.

    ``inputs``: a batch to look at, input_ids at least; random tokens, the first half of each row its prompt, where not given.
    ``move``: the part of the state's length; if not given 0.1, or 0.3 where the model writes no text and every token
    is edited.

    The model is left as it was. W, b and whatever else is trained are moved; R, whose rate follows W's, is not: where R is
    trained the rate is 1 / sqrt(d) at most, at which a step of Adam's is as long as a row of R itself.
    ``ValueError`` where nothing is trained, where the model gives no hidden states, or where a step changes none.
    """
    from .model import get_reft_model

    if config is None:
        return _suggested(model, inputs, move)
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.random.fork_rng(devices=[]):  # for the weights that are drawn
        adapted: Any = get_reft_model(model, config)
    try:
        return _suggested(adapted, inputs, move)
    finally:
        adapted.unload()
        for p in trained:  # which PEFT has frozen
            p.requires_grad_(True)


def _suggested(model: nn.Module, inputs: Mapping[str, Tensor] | None, move: float | None) -> float:
    known = orthonormal_parameters()
    Rs = [p for p in model.parameters() if p.requires_grad and id(p) in known]
    trained = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    if not trained:
        raise ValueError("model has no parameter that requires a gradient, so that no rate suits it")
    device = next(model.parameters()).device
    batch = _random_batch(model, device) if inputs is None else {name: t.to(device) for name, t in inputs.items()}
    if move is None:
        move = MOVE_EDITED if _edits_all_it_reads(model) else MOVE
    with _still(model):
        found = _last_hidden(model, batch)
        if not found.requires_grad:
            raise ValueError(_NO_CHANGE)
        before = found.detach()
        direction = torch.randn(found.shape[-1], generator=torch.Generator().manual_seed(0)).to(device)
        grads = torch.autograd.grad((found.float() @ direction).sum(), trained, allow_unused=True)
        signs: list[Tensor | None] = [None if g is None else g.sign() for g in grads]
        del found, grads
        rate = _rate(lambda rate: _moved(model, batch, before, trained, signs, rate), move)
    return float(f"{min([rate, *(R.shape[-1] ** -0.5 for R in Rs)]):.2g}")


def _rate(moved: Callable[[float], float], move: float) -> float:
    """The rate that moves by ``move``: in proportion, again and again, as what is moved grows less than the rate in the end."""
    rate = 1e-3
    for _ in range(_STEPS):
        found = moved(rate)
        if not found > 0:
            raise ValueError(_NO_CHANGE)
        rate *= min(max(move / found, 1e-2), 1e2)
        if abs(found - move) <= _NEAR * move:
            break
    return rate


def _random_batch(model: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """Random tokens, and where a causal model's prompts end: the rows behind are what the edit of a prompt is for."""
    config: Any = model.config
    vocabulary = config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    first = min(100, vocabulary // 4)  # past the special tokens that vocabularies begin with
    ids = torch.randint(first, vocabulary, (SAMPLES, TOKENS), generator=generator).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _writes(model: nn.Module) -> bool:
    """Whether what comes behind a prompt counts: of causal language models."""
    config: Any = model.config
    return bool(getattr(model, "can_generate", lambda: False)()) and not config.is_encoder_decoder


def _edits_all_it_reads(model: nn.Module) -> bool:
    """Whether every token of a model that writes none is edited."""
    found = {spec.positions for layer in layers_of(model) for spec in layer.specs.values()}
    return not _writes(model) and any(p.end is None and not p.places for p in found)


def _last_hidden(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The last hidden state: of the tokens behind the prompt, or of all tokens of a model that writes none."""
    config: Any = model.config
    batch = dict(batch)
    if config.is_encoder_decoder:
        batch.setdefault("decoder_input_ids", batch["input_ids"][:, : TOKENS // 4])
    writes = _writes(model)
    half = batch["input_ids"].shape[1] // 2
    if writes and layers_of(model):
        batch.setdefault("reft_prompt_lengths", batch["attention_mask"][:, :half].sum(1))
    output = model(**batch, output_hidden_states=True)
    states = getattr(output, "decoder_hidden_states", None) or getattr(output, "hidden_states", None)
    if not states:
        raise ValueError(f"{type(model).__name__} gives no hidden states, so that no rate can be told from another")
    return states[-1][:, half:] if writes else states[-1]


@torch.no_grad()
def _moved(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    before: Tensor,
    trained: list[nn.Parameter],
    signs: list[Tensor | None],
    rate: float,
) -> float:
    """How far a step of ``rate`` moves the state, as a part of its length: on average over the tokens behind the prompt, or
    where a head reads one token or all, that which moves most."""
    old = [p.detach().clone() for p in trained]
    try:
        for p, sign in zip(trained, signs, strict=True):
            if sign is not None:
                p.add_(sign, alpha=rate)
        after = _last_hidden(model, batch).float()
    finally:
        for p, value in zip(trained, old, strict=True):
            p.copy_(value)
    change = (after - before.float()).norm(dim=-1) / before.float().norm(dim=-1).clamp_min(1e-12)
    return float(change.mean() if _writes(model) else change.max(-1).values.mean())


@contextmanager
def _still(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and gradients, and the modes of all modules as they were."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.enable_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
