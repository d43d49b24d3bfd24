"""ReFT-r1: one direction that detects a concept and writes it, trained on what a model is to write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..interventions import Intervention
from ..models.blocks import hidden_size
from ..optim import ReftAdamW
from .direction import Direction
from .given import Text, check_counts, check_texts, site_of
from .states import padded
from .training import batches, descend, edited, falling, made_by, steps_in


class ReftR1(Intervention):
    """h + mean(top-k over the text's tokens of ReLU(w h)) w, |w| = 1; the latents that are not among them are kept for the
    penalty. R (1, d) is w, which the retraction keeps at length 1."""

    def __init__(self, embed_dim: int, topk: int):
        super().__init__(embed_dim, 1)
        self.topk = topk
        self.rest: Tensor | None = None

    def build(self, dtype: torch.dtype, add_bias: bool) -> None:
        self.R = self._matrix(dtype)

    def change(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """The states (B, T, d) with the direction added at ``tokens``, bool (B, T)."""
        wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        latents = torch.relu(wide @ self.R[0]) * tokens
        top, where = latents.topk(min(self.topk, latents.shape[1]), dim=1)
        rest = latents.scatter(1, where, 0.0)
        self.rest = (rest.sum(1) / tokens.sum(1).clamp(min=1)).mean()
        added = top.mean(1)[:, None, None] * self.R[0] * tokens[..., None]
        return (wide + added).to(hidden.dtype)


def reft_r1(
    model: nn.Module,
    layer: int,
    texts: Sequence[Text],
    labels: Sequence[Text],
    *,
    first: int = 1,
    topk: int = 8,
    sparsity: float = 5e-3,
    lr: float = 1e-2,
    epochs: int = 3,
    batch_size: int = 6,
    seed: int = 0,
    log: Callable[[int, float], None] | None = None,
) -> Direction:
    """Train ReFT-r1 on ``texts`` with ``labels`` (-100: not to be learnt), a list of token ids each; the model stays as it is.

    The loss is the language model's with h + mean(topk_k(ReLU(w h))) w in place of each state h of a text but its ``first``,
    plus (step / steps) ``sparsity`` times the mean of the latents outside the top k; ``lr`` falls to 0 in a line. Defaults are
    AxBench's. The start is the direction along which every coordinate is the same, as there.

    Source: AxBench (Wu et al. 2025, arXiv 2501.17148), as its code has it. ``ValueError`` where texts and labels do not go
    together, no label is to be learnt, and for counts below 1.
    """
    site = site_of(model, layer)
    check_texts(texts=texts, labels=labels)
    check_counts(1, topk=topk, epochs=epochs, batch_size=batch_size)
    check_counts(0, first=first)
    if len(texts) != len(labels) or any(len(t) != len(own) for t, own in zip(texts, labels, strict=False)) or not texts:
        raise ValueError("texts and labels must be as many, one at least, each text with a label a token")
    learnt = [any(int(label) != -100 for label in own[1:]) for own in labels]  # nothing comes before a first token
    if not any(learnt):
        raise ValueError("labels are -100 behind the first token of each text, so that none is learnt; give some")
    device = next(model.parameters()).device
    edit = made_by(seed, ReftR1, hidden_size(model, site.name), topk)
    with torch.no_grad():
        edit.R.fill_(edit.embed_dim**-0.5)
    edit.to(device)
    optimizer = ReftAdamW([edit.R], lr=lr, weight_decay=0.0)
    total = steps_in(len(texts), batch_size, epochs)
    schedule = falling(optimizer, total)
    order = batches(len(texts), batch_size, epochs, torch.Generator().manual_seed(seed))
    with edited(model, site) as place, torch.enable_grad():
        for step, own in enumerate(order):
            batch = padded([texts[i] for i in own], device)
            tokens = batch["attention_mask"].bool()
            tokens[:, :first] = False
            wanted = torch.full_like(batch["input_ids"], -100)
            for row, i in enumerate(own):
                wanted[row, : len(labels[i])] = torch.as_tensor(labels[i], device=device)
            place.change = partial(edit.change, tokens=tokens)
            loss: Any = model(**batch, labels=wanted, use_cache=False).loss
            if not any(learnt[i] for i in own):
                loss = 0.0  # a mean over no label is NaN
            assert edit.rest is not None  # the site has been run
            found = descend(loss + step / total * sparsity * edit.rest, optimizer, schedule)
            if log is not None:
                log(step, found)
    made = Direction(edit.R[0], layer, first=first, method="reft_r1")
    scored = [text for text, own in zip(texts, learnt, strict=True) if own]
    made.largest = max(float(made.scores(model, scored).max()), 1e-6)
    return made
