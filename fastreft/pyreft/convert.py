"""pyreft's checkpoints as PEFT adapters of fastreft, and back: ``load`` and ``save``."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..models.blocks import hidden_size
from ..tuner.config import ReftConfig
from ..tuner.model import ReftLayer, get_reft_model
from . import checkpoint, components, format
from .checkpoint import Entry
from .format import CheckpointError
from .model import ReftModel, model_weights


def load(
    path: str | os.PathLike,
    model: nn.Module,
    *,
    positions: str | None = None,
    act_fn: str | None = None,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
    intervention_type: str | None = None,
    orthonormalise: bool = False,
    adapter_name: str = "default",
    task_type: str | None = None,
) -> PeftModel:
    """A pyreft checkpoint as a PEFT adapter on ``model``, ready to use, to train on and to ``save_pretrained``.

    ``model`` is a base model, or a PEFT model that gets one more adapter.

    What pyreft's files do not say is asked for here: ``positions`` (default "l1", and "f1+l1" where prefix and suffix have an
    intervention each), ``act_fn`` (default linear), ``dropout``, the ``dtype`` of W, b and P (default fp32, which holds bf16
    files exactly) and, for a trainer's checkpoint without config.json, the ``intervention_type`` where two kinds look the same.
    ``task_type`` is PEFT's, by default CAUSAL_LM for a model that generates.
    Positions of short prompts are counted as pyreft counts them. ``orthonormalise`` gives an R that pyreft let drift
    orthonormal rows without changing the edit; without it such an R is kept, with a warning.
    Raises :class:`CheckpointError`, a ``ValueError``, and then ``model`` is as it was.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    entries = checkpoint.read(
        path,
        intervention_type=intervention_type,
        act_fn=act_fn,
        dropout=dropout,
        dtype=dtype,
        orthonormalise=orthonormalise,
    )
    trained = sorted(model_weights(path, base))
    if trained:
        warnings.warn(
            f"'{path}' holds weights of the base model that were trained, too, such as {trained[0]}; an adapter of ours does "
            "not: load them into the base first, as fastreft.pyreft.ReftModel.load does with include_model=True",
            stacklevel=2,
        )
    groups, side = _group(base, entries)
    tied = len(groups) == 1
    first = entries[0].intervention
    kinds = {(format.kind_of(entry.intervention), entry.intervention.r) for entry in entries}
    partitions = {entry.intervention.partition for entry in entries}
    if len(partitions) > 1:
        raise CheckpointError(
            f"'{path}' has interventions with other subspace_partitions than others; one adapter has the same groups "
            "everywhere, so use fastreft.pyreft.ReftModel.load, which keeps one intervention a representation"
        )
    if len(kinds) > 1:
        raise CheckpointError(
            f"'{path}' mixes {', '.join(f'{kind} of rank {r}' for kind, r in sorted(kinds))}; one adapter has one kind and "
            "rank, so use fastreft.pyreft.ReftModel.load, which keeps one intervention a representation"
        )
    _check_widths(base, {entry.intervention.embed_dim for entry in entries})
    names = components.block_names(base)
    chosen = list(groups[0])
    blocks_only = set(chosen) <= set(names)
    generates = getattr(base, "can_generate", bool)() and not base.config.is_encoder_decoder  # type: ignore[union-attr]
    config = ReftConfig(
        task_type=task_type or ("CAUSAL_LM" if generates else None),
        intervention_type=format.kind_of(first),
        r=first.r,
        subspaces=[list(rows) for _, rows in first.partition] or None,
        positions=positions or ("l1" if tied else "f1+l1"),
        tied=tied,
        layers_to_transform=sorted(map(names.index, chosen)) if blocks_only else None,
        target_modules=None if blocks_only else chosen,
        dropout=dropout,
        act_fn=act_fn,
        add_bias="c" in first._parameters,
        component=f"block_{side}",
        pyreft_compat=True,
    )
    if not tied and "+" not in config.positions:
        raise CheckpointError(
            f"positions is {positions!r}; this checkpoint has one intervention for the prefix and one for the suffix, "
            "so it must be 'fN+lM'"
        )
    if isinstance(model, PeftModel):
        model.add_adapter(adapter_name, config)
        made = model
    else:
        made = get_reft_model(model, config, adapter_name=adapter_name)
    layers = dict(_layers(made))
    for containers, group in zip(("reft_edit", "reft_suffix"), groups, strict=False):
        for name, intervention in group.items():
            held = getattr(layers[name], containers)[adapter_name]
            for own, parameter in intervention.named_parameters(recurse=False):
                new = held._parameters[own]
                held._parameters[own] = nn.Parameter(parameter.detach().to(new.device), requires_grad=new.requires_grad)
    return made


def _check_widths(model: nn.Module, widths: set[int]) -> None:
    """:class:`CheckpointError` where interventions were made for another hidden size."""
    wanted = hidden_size(model)
    if widths != {wanted}:
        raise CheckpointError(
            f"the checkpoint was made for a hidden size of {', '.join(map(str, sorted(widths)))}; "
            f"this {type(model).__name__} has {wanted}"
        )


def _group(model: nn.Module, entries: list[Entry]) -> tuple[list[dict[str, Any]], str]:
    """(module name -> intervention, for the only or first one of a place, and for the second one; the side of all)."""
    groups: list[dict[str, Any]] = [{}, {}]
    names, sides = set(components.block_names(model)), set[str]()
    for entry in entries:
        component = components.unflatten(model, entry.component) if entry.flat else entry.component
        place = components.locate(model, entry.layer, component)
        if place.side == "input" and place.name not in names:
            raise CheckpointError(
                f"component is {component!r}; an adapter edits outputs, and blocks' inputs: use "
                "fastreft.pyreft.ReftModel.load, which edits any input"
            )
        sides.add(place.side)
        group = next((group for group in groups if place.name not in group), None)
        if group is None:
            raise CheckpointError(
                f"{place.name} has more than two interventions; use fastreft.pyreft.ReftModel.load, which takes any number"
            )
        group[place.name] = entry.intervention
    if groups[1] and groups[0].keys() != groups[1].keys():
        odd = min(groups[0].keys() ^ groups[1].keys())
        raise CheckpointError(
            f"some places have one intervention and some two, see {odd}; use fastreft.pyreft.ReftModel.load, "
            "which takes any number"
        )
    if len(sides) > 1:
        raise CheckpointError(
            "some interventions edit outputs and some inputs; use fastreft.pyreft.ReftModel.load, which takes both"
        )
    return groups if groups[1] else groups[:1], sides.pop()


def save(
    model: nn.Module, path: str | os.PathLike, *, adapter_name: str | None = None, keep_type: bool = False
) -> None:
    """An adapter of ours, or a :class:`fastreft.pyreft.ReftModel`, as a folder that pyreft loads.

    pyreft saves NoReFT and NoDiReFT but cannot build them again, so they are written as the LoReFT and the DiReFT that make
    the same edit; ``keep_type`` writes them as they are. Positions, act_fn and dropout have no place in pyreft's files: a
    warning says so of an act_fn, as pyreft's load takes linear. ``ValueError`` for a model without a ReFT adapter, for
    positions that pyreft cannot be asked for (dK, a:b), and for modules that were trained whole (``modules_to_save``).
    """
    entries = model.entries() if isinstance(model, ReftModel) else _entries(model, adapter_name)
    act_fns = {entry.intervention.act_fn for entry in entries} - {None, "linear"}
    if act_fns:
        warnings.warn(
            f"act_fn is {', '.join(map(repr, sorted(map(str, act_fns))))}, which pyreft's files have no place for: its load "
            "takes linear, so build the model there with that act_fn and read the weights into it",
            stacklevel=2,
        )
    elif not keep_type:
        entries = [replace(entry, intervention=format.orthonormal_twin(entry.intervention)) for entry in entries]
    checkpoint.write(path, entries)


def _entries(model: nn.Module, adapter_name: str | None) -> list[Entry]:
    """An adapter's interventions and their places, all prefixes before the suffixes."""
    layers = _layers(model)
    active = adapter_name or next((name for _, layer in layers for name in layer.reft_edit), None)
    if active is None or not any(active in layer.reft_edit for _, layer in layers):
        raise ValueError(f"adapter_name is {adapter_name!r}; this {type(model).__name__} has no such ReFT adapter")
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    modules = [(name, module) for name, module in base.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    whole = [name for name, module in modules if active in module._adapters]
    if whole:
        raise ValueError(
            f"modules_to_save: the adapter {active!r} has {', '.join(whole)} trained whole, for which pyreft's files have no "
            "place, and without which the model is another one"
        )
    numbered = next((str(layer.specs[active].positions) for _, layer in layers
                     if active in layer.specs and layer.specs[active].positions.numbered), None)  # fmt: skip
    if numbered is not None:
        raise ValueError(
            f"positions is {numbered!r}, tokens counted over what is written, which pyreft has no like of: it edits columns of "
            "the prompt, or every decoded token"
        )
    held = [(name, layer, layer.interventions(active)) for name, layer in layers]
    entries = []
    for i in range(max(len(interventions) for _, _, interventions in held)):
        for name, layer, interventions in held:
            if interventions:
                place = components.Place(name, "input" if layer.specs[active].at_input else "output")
                entries.append(Entry(*components.describe(base, place), interventions[i]))
    return entries


def _layers(model: nn.Module) -> list[tuple[str, ReftLayer]]:
    """Every edited module's name in the base model, and its layer, in the model's order."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return [
        (name.removesuffix(".reft"), module) for name, module in base.named_modules() if isinstance(module, ReftLayer)
    ]
