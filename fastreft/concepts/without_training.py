"""Directions from the hidden states of texts with and without a concept: the model itself is not trained through."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .direction import Direction
from .given import Text, check_texts
from .states import states

LEAST = 1e-5  # of two means, how far apart they are in parts of their length: below it is what rounding leaves


def _sides(
    model: nn.Module, layer: int, with_it: Sequence[Text], without: Sequence[Text], first: int, batch_size: int
) -> tuple[Tensor, Tensor]:
    """The states of all tokens with the concept, and of those without, (n, d) each. ``ValueError`` where a side has no token,
    and where their means are the same: neither a difference nor a probe, whose gradient at 0 is that difference, is then any
    direction."""
    check_texts(with_it=with_it, without=without)
    sides = [
        [rows for rows in states(model, layer, texts, batch_size=batch_size, first=first) if len(rows)]
        for texts in (with_it, without)
    ]
    for name, side in zip(("with_it", "without"), sides, strict=True):
        if not side:
            raise ValueError(f"{name} holds no text of more than {first} tokens")
    a, b = torch.cat(sides[0]), torch.cat(sides[1])
    apart, length = float((a.mean(0) - b.mean(0)).norm()), float(a.mean(0).norm())
    if apart <= LEAST * length:
        raise ValueError(
            f"with_it and without have the same mean state at layer {layer} ({apart:.2g} apart, {length:.2g} long), as where "
            "their texts are the same: no direction tells them apart"
        )
    return a, b


def _largest(rows: Tensor, made: Direction) -> float:
    """The largest latent of some states, above 0, so that a strength above 0 adds the direction."""
    return max(float((rows @ made.vector.to(rows.device)).max()) + made.bias, 1e-6)


def diff_mean(
    model: nn.Module,
    layer: int,
    with_it: Sequence[Text],
    without: Sequence[Text],
    *,
    first: int = 1,
    batch_size: int = 16,
) -> Direction:
    """The difference of the mean states of tokens of texts with a concept and without, but their ``first``, as a direction.

    Source: Marks and Tegmark 2023, arXiv 2310.06824; AxBench (Wu et al. 2025, arXiv 2501.17148), DiffMean. ``ValueError``
    for a side without a token but those, and where the means are the same.
    """
    a, b = _sides(model, layer, with_it, without, first, batch_size)
    made = Direction(a.mean(0) - b.mean(0), layer, first=first, method="diff_mean")
    made.largest = _largest(a, made)
    return made


def linear_probe(
    model: nn.Module,
    layer: int,
    with_it: Sequence[Text],
    without: Sequence[Text],
    *,
    weight_decay: float = 1e-3,
    first: int = 1,
    batch_size: int = 16,
) -> Direction:
    """A logistic regression that tells tokens of texts with a concept from tokens of texts without, as a direction.

    The states are divided by their mean length, ``weight_decay`` is the ridge's, and the fit goes to its end (L-BFGS), so
    that nothing is drawn. Source: Alain and Bengio 2016, arXiv 1610.01644; AxBench's Probe has the same loss, by AdamW.
    """
    a, b = _sides(model, layer, with_it, without, first, batch_size)
    rows = torch.cat([a, b])
    scale = rows.norm(dim=1).mean()
    rows = rows / scale
    wanted = torch.cat([torch.ones(len(a)), torch.zeros(len(b))]).to(rows.device)
    w = torch.zeros(rows.shape[1], device=rows.device, requires_grad=True)
    c = torch.zeros(1, device=rows.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([w, c], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        found = F.binary_cross_entropy_with_logits(rows @ w + c, wanted) + weight_decay * w.square().sum()
        found.backward()
        return found

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[arg-type]  # a closure that gives a tensor, as torch's own examples do
    length = float(w.detach().norm())
    made = Direction(
        w, layer, bias=float(c.detach()) * float(scale) / max(length, 1e-30), first=first, method="linear_probe"
    )
    made.largest = _largest(a, made)
    return made
