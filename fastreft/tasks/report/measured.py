"""What an adapter does to a model, in numbers: how far each layer's edit moves each token, along which directions, towards
which words, and how the layers' subspaces lie to one another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...interventions import Intervention
from ...kinds import TorchIntervention
from ...tuner.layer import ReftLayer
from ...tuner.loading import layers_of


class Edits(NamedTuple):
    """One text's: ``share`` (L, S) is |edit| / |h| of each edited module and token, ``moved`` the edits themselves, (S, d)."""

    share: Tensor
    moved: list[Tensor]


class Direction(NamedTuple):
    """The direction along which a layer's edits lie most: ``part`` of their squared length; the tokens that it makes likelier,
    and less likely, read through the unembedding."""

    layer: str
    part: float
    up: list[str]
    down: list[str]


def names_of(model: nn.Module) -> list[str]:
    """The edited modules, as short as they can be told apart: the layers' numbers where there is one for each."""
    names = [layer.name for layer in layers_of(model)]
    numbers = [next((part for part in name.split(".") if part.isdigit()), "") for name in names]
    return numbers if all(numbers) and len(set(numbers)) == len(names) else names


def interventions_of(model: nn.Module) -> list[tuple[str, Intervention]]:
    """(where, intervention) of every one, a layer's prefix before its suffix."""
    found = []
    for name, layer in zip(names_of(model), layers_of(model), strict=True):
        own = [edit for which in layer.specs for edit in layer.interventions(which)]
        found += [(name if len(own) == 1 else f"{name}.{i}", edit) for i, edit in enumerate(own)]
    return found


@contextmanager
def _watched(layers: list[ReftLayer], length: int) -> Iterator[dict[int, list[Tensor]]]:
    """Within it the hidden state of each layer's module, before and behind the edit, (S, d), of the first forward."""
    seen: dict[int, list[Tensor]] = {i: [] for i in range(len(layers))}

    def keep(i: int) -> Callable[..., None]:
        layer = layers[i]

        def hook(module: Any, args: tuple[Any, ...], *output: Any) -> None:
            given = output[0] if output else args
            hidden: Tensor = given[0] if isinstance(given, (tuple, list)) else given
            if len(seen[i]) < 2:
                places: Any = torch.arange(hidden.shape[:-1].numel()).view(hidden.shape[:-1])
                if layer.layout is not None:
                    places = layer.layout(places, length)[..., 0]
                rows = hidden.detach().reshape(-1, hidden.shape[-1])[places.reshape(-1)]
                seen[i].append(rows.float().cpu())

        return hook

    handles = []
    for i, layer in enumerate(layers):
        at_input = any(spec.at_input for spec in layer.specs.values())
        block = layer.get_base_layer()
        register: Any = block.register_forward_pre_hook if at_input else block.register_forward_hook
        handles += [register(keep(i), prepend=True), register(keep(i))]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def edits_of(model: Any, ids: list[int], writes: bool) -> Edits:
    """What a model's adapter does to a text; all of it is prompt to one that writes."""
    layers = layers_of(model)
    batch = {"input_ids": torch.tensor([ids]).to(model.device)}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    with _watched(layers, len(ids)) as seen:
        if writes:
            model.generate(**batch, max_new_tokens=1, do_sample=False)
        else:
            model(**batch)
    shares, moved = [], []
    for before, behind in (pair for pair in seen.values() if len(pair) == 2):
        change = behind - before
        shares.append(change.norm(dim=-1) / before.norm(dim=-1).clamp_min(1e-12))
        moved.append(change)
    return Edits(torch.stack(shares), moved)


def overlaps(model: nn.Module) -> Tensor:
    """(n, n): |Q_i Q_j'|^2 / r of the orthonormal bases Q of what the interventions edit: 1 for the same subspace, 0 for
    orthogonal ones, r/d for two of chance. Empty where they are formulas, which edit whatever they do."""
    bases = []
    for _, edit in interventions_of(model):
        if isinstance(edit, TorchIntervention):
            return torch.empty(0, 0)
        bases.append(torch.linalg.qr(edit.weights()[0].detach().double().cpu().T).Q)
    return torch.tensor([[float((a.T @ b).square().sum()) / min(a.shape[1], b.shape[1]) for b in bases] for a in bases])


def directions(model: Any, tokenizer: Any, texts: list[Edits], tokens: int = 6) -> list[Direction]:
    """Each layer's main direction, read as the model would read a last hidden state: scaled by the last norm's weight, then
    multiplied with the unembedding (the logit lens, nostalgebraist 2020). [] for a model that has none of the edits' width."""
    unembedding = model.get_output_embeddings()
    weight = getattr(unembedding, "weight", None)
    if weight is None or not texts or any(move.shape[-1] != weight.shape[1] for move in texts[0].moved):
        return []
    weight = weight.detach().float().cpu()
    scale = _last_norm(model, weight.shape[1])
    found = []
    for i, name in enumerate(names_of(model)):
        moves = torch.cat([text.moved[i] for text in texts])
        moves = moves[moves.norm(dim=-1) > 0]
        if not len(moves):
            continue
        _, lengths, along = torch.linalg.svd(moves, full_matrices=False)
        direction = along[0] * (1 if float((moves @ along[0]).sum()) >= 0 else -1)
        logits = weight @ (direction * scale)
        part = float(lengths[0].square() / lengths.square().sum())
        up, down = logits.topk(tokens).indices, (-logits).topk(tokens).indices
        found.append(Direction(name, part, *([_shown(tokenizer, int(t)) for t in which] for which in (up, down))))
    return found


def _shown(tokenizer: Any, token: int) -> str:
    """A token on one line."""
    return repr(tokenizer.decode([token]))[1:-1]


def _last_norm(model: Any, width: int) -> Tensor:
    """The weight of the norm behind the last block; ones where there is none to be found."""
    inner = getattr(model.get_base_model(), model.get_base_model().base_model_prefix, None)
    for module in reversed(list(inner.children()) if isinstance(inner, nn.Module) else []):
        weight = getattr(module, "weight", None)
        if "norm" in type(module).__name__.lower() and weight is not None and weight.shape == (width,):
            return weight.detach().float().cpu()
    return torch.ones(width)
