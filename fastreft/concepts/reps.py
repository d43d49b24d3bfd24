"""RePS: a vector trained by preference, to bring a concept into what a model writes and, nulled, to keep it out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..interventions import Intervention
from ..models.blocks import hidden_size
from ..tuner.steered import finite
from .direction import Direction
from .given import Text, check_counts, check_texts, site_of
from .states import padded
from .training import Edited, batches, descend, edited, falling, made_by, steps_in

FACTORS = tuple(range(2, 21, 2))


class SteeredVector(Intervention):
    """h + (a + c) v for a strength a, and for a = 0 h - ReLU(v h + c) v / |v|^2, which takes the concept out."""

    orthonormal = False

    def build(self, dtype: torch.dtype, add_bias: bool) -> None:
        self.v = nn.Parameter(torch.empty(self.embed_dim, dtype=dtype))
        self.c = nn.Parameter(torch.zeros(1, dtype=dtype))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """v as ``nn.Linear``, c = 0."""
        super().reset_parameters()
        self.c.zero_()

    def change(self, hidden: Tensor, tokens: Tensor, strength: float) -> Tensor:
        """The states (B, T, d) edited at ``tokens``, bool (B, T)."""
        wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        if strength:
            along = (strength + self.c).expand(tokens.shape)
        else:
            along = -torch.relu(wide @ self.v + self.c) / self.v.square().sum()
        return (wide + (along * tokens)[..., None] * self.v).to(hidden.dtype)


def preference_loss(chosen: Tensor, rejected: Tensor, lengths: Sequence[Tensor], reference: Sequence[Tensor]) -> Tensor:
    """-log sigmoid(beta / |chosen| log p(chosen) - 1 / |rejected| log p(rejected)) of each pair, (n,), with
    beta = max(log p0(rejected) - log p0(chosen), 1), p0 the model without an edit: what it would not write counts
    more.

    ``chosen``, ``rejected``: summed log probabilities (n,); ``lengths``: their tokens; ``reference``: theirs under p0.
    Source: RePS (Wu et al. 2025, arXiv 2505.20809), the loss as its code has it.
    """
    beta = (reference[1] - reference[0]).clamp(min=1)
    return -F.logsigmoid(beta / lengths[0] * chosen - rejected / lengths[1])


def reps(
    model: nn.Module,
    layer: int,
    prompts: Sequence[Text],
    with_it: Sequence[Text],
    without: Sequence[Text],
    *,
    factors: Sequence[float] = FACTORS,
    first: int = 1,
    lr: float = 1e-2,
    epochs: int = 3,
    batch_size: int = 6,
    seed: int = 0,
    log: Callable[[int, float], None] | None = None,
) -> Direction:
    """Train a vector v by RePS; the model stays as it is. ``largest`` of the direction is |v|: its strengths are RePS' factors.

    ``prompts``, and answers ``with_it``, which have the concept, and ``without``, the model's own: token ids each. At a factor
    drawn of ``factors`` the model is to prefer the first, with the concept nulled the second; every token of a text but its
    ``first`` is edited. ``factors`` are in units of what v grows to: which suit depends on the model and the layer.

    Source: RePS (Wu et al. 2025, arXiv 2505.20809). ``ValueError`` where the lists are not as long, a prompt or
    an answer is empty, a factor is 0 or no finite number, and for counts below 1.
    """
    site = site_of(model, layer)
    check_texts(prompts=prompts, with_it=with_it, without=without)
    check_counts(1, epochs=epochs, batch_size=batch_size)
    check_counts(0, first=first)
    if not len(prompts) == len(with_it) == len(without) or not prompts:
        raise ValueError("prompts, with_it and without must be as many, one at least")
    said = f"factors is {factors!r}; it must be a list of finite numbers other than 0"
    given = factors.tolist() if hasattr(factors, "tolist") else factors
    strengths = [finite(factor, said) for factor in given] if isinstance(given, (list, tuple)) else []
    if not strengths or not all(strengths):
        raise ValueError(said)
    asked = [*zip(prompts, with_it, strict=True), *zip(prompts, without, strict=True)]
    texts = [[*_ids(prompt), *_ids(answer)] for prompt, answer in asked]
    begins = [len(prompt) for prompt in prompts] * 2
    device = next(model.parameters()).device
    edit = made_by(seed, SteeredVector, hidden_size(model, site.name), 1).to(device)
    optimizer = torch.optim.AdamW(edit.parameters(), lr=lr, weight_decay=0.0)
    count = len(prompts)
    schedule = falling(optimizer, steps_in(count, batch_size, epochs))
    generator = torch.Generator().manual_seed(seed)

    def log_probabilities(place: Edited, which: Sequence[int], strength: float | None) -> tuple[Tensor, Tensor]:
        """Of the answers of some texts, and their tokens, (n,); without an edit where ``strength`` is None."""
        batch = padded([texts[i] for i in which], device)
        tokens = batch["attention_mask"].bool()
        tokens[:, :first] = False
        place.change = None if strength is None else partial(edit.change, tokens=tokens, strength=strength)
        logits = model(**batch, use_cache=False).logits[:, :-1].float()
        ids = batch["input_ids"][:, 1:]
        places = torch.arange(1, batch["input_ids"].shape[1], device=device)
        starts = torch.tensor([begins[i] for i in which], device=device)
        answer = batch["attention_mask"][:, 1:].bool() & (places >= starts[:, None])
        found = logits.log_softmax(-1).gather(2, ids[..., None])[..., 0]
        return (found * answer).sum(1), answer.sum(1)

    with edited(model, site) as place:
        for step, own in enumerate(batches(count, batch_size, epochs, generator)):
            strength = strengths[int(torch.randint(len(strengths), (1,), generator=generator))]
            pairs = own + [i + count for i in own]  # with the concept, and without
            with torch.no_grad():
                base, lengths = [each.chunk(2) for each in log_probabilities(place, pairs, None)]
            with torch.enable_grad():
                added = log_probabilities(place, pairs, strength)[0].chunk(2)
                nulled = log_probabilities(place, pairs, 0.0)[0].chunk(2)
                loss = preference_loss(added[0], added[1], lengths, base).mean()
                loss = loss + preference_loss(nulled[1], nulled[0], lengths[::-1], base[::-1]).mean()
                found = descend(loss, optimizer, schedule)
            if log is not None:
                log(step, found)
    length = float(edit.v.detach().norm())
    return Direction(edit.v, layer, float(edit.c.detach()) / length, first, length, "reps")


def _ids(text: Text) -> list[int]:
    return text.tolist() if isinstance(text, Tensor) else list(text)
