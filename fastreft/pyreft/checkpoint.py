"""A folder of pyreft's: config.json and one intkey_<key>.bin an intervention, or the bare files of a trainer's checkpoint.

Reading checks everything before it gives anything; writing puts each file in place whole, config.json last.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..files import staged
from ..interventions import Intervention
from ..ops.groups import of_pyvene, to_pyvene
from . import format
from .format import CheckpointError

CONFIG, MODEL_WEIGHTS, TRAINER_FOLDER = "config.json", "pytorch_model.bin", "intervenable_model"
_UNIT = "pos"
_TOLERANCE = 1e-5  # of R R^T = I: what fp32 keeps
_FIELDS = 14  # of a representation, 13 up to pyreft 0.1.2
_PARTITION = 7  # of a representation: the groups of its rows
_GROUP_KEY = 8  # the one of the optional fields that changes nothing here
# intkey_layer_3_comp_block_output_unit_pos_nunit_1#0.bin and, up to pyvene 0.1.6, the same with dots.
_FILE = re.compile(r"intkey_(?:layer[_.](\d+)[_.])?comp[_.](.+)[_.]unit[_.]pos[_.]nunit[_.]1#(\d+)\.bin")


@dataclass
class Entry:
    """One intervention of a checkpoint and where it sits; ``flat``: the component's dots were lost in the file's name."""

    layer: int | None
    component: str
    intervention: Intervention
    flat: bool = False


def find(path: str | os.PathLike) -> Path:
    """The folder with the interventions: the one given, or ``intervenable_model`` in a trainer's checkpoint."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder '{path}'")
    for candidate in (folder, folder / TRAINER_FOLDER):
        if any(candidate.glob("intkey_*.bin")):
            return candidate
    raise CheckpointError(f"'{path}' is not a pyreft checkpoint: it has no intkey_*.bin")


def read(
    path: str | os.PathLike,
    *,
    intervention_type: str | None = None,
    dtype: torch.dtype | None = None,
    dropout: float = 0.0,
    act_fn: str | None = None,
    orthonormalise: bool = False,
) -> list[Entry]:
    """The interventions of a folder, in the order in which pyreft counts them; the keywords are :func:`fastreft.pyreft.load`'s.

    :class:`CheckpointError` for any other folder.
    """
    folder = find(path)
    files = {file.name: file for file in sorted(folder.glob("intkey_*.bin"))}
    if (folder / CONFIG).is_file():
        listed = _listed(folder / CONFIG, set(files))
    else:
        listed = _named(files)
    entries = []
    for name, layer, component, flat, kind, rank, partition in listed:
        tensors = format.read_tensors(files[name])
        made = format.to_intervention(
            tensors, f"'{name}'", kind or intervention_type, dtype=dtype, dropout=dropout, act_fn=act_fn
        )
        if rank is not None and rank != made.r:
            raise CheckpointError(f"'{name}' has rank {made.r}, but {CONFIG} says low_rank_dimension {rank}")
        try:
            made.partition = () if partition is None else of_pyvene(partition, made.r)
        except ValueError as error:
            raise CheckpointError(f"'{name}': {error}") from None
        entries.append(Entry(layer, component, made, flat))
    _check_rotations([entry.intervention for entry in entries], orthonormalise, str(path))
    return entries


def _check_rotations(interventions: list[Intervention], orthonormalise: bool, path: str) -> None:
    """Repair an R that is not orthonormal where asked to, else warn of the worst."""
    drifted = [(format.orthonormality_error(m), m) for m in interventions]
    drifted = [(error, m) for error, m in drifted if error > _TOLERANCE]
    if not drifted:
        return
    if orthonormalise:
        for _, intervention in drifted:
            format.orthonormalise_(intervention)
        return
    warnings.warn(
        f"{len(drifted)} of the {len(interventions)} interventions in '{path}' have an R whose rows are not orthonormal "
        f"(by {max(error for error, _ in drifted):.2g}); they are kept as they are, but training on would move them: "
        "orthonormalise=True gives them orthonormal rows and the same edit",
        stacklevel=4,
    )


_Listed = list[tuple[str, int | None, str, bool, str | None, int | None, Any]]


def _listed(config: Path, files: set[str]) -> _Listed:
    """(file, layer, component, False, kind, rank, groups of its rows) of each representation that config.json lists."""
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
        representations, types = settings["representations"], settings["intervention_types"]
        pairs = list(zip(representations, types, strict=True))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"'{config.name}' is not pyreft's: it must list representations and as many intervention_types ({error})"
        ) from error
    places = [_representation(fields) for fields, _ in pairs]
    found: _Listed = []
    both_styles = zip(keys([place[:2] for place in places]), keys([place[:2] for place in places], "."), strict=True)
    for (layer, component, rank, partition), (_, type_name), styles in zip(places, pairs, both_styles, strict=True):
        name = next((name for key in styles if (name := f"intkey_{key}.bin") in files), None)
        if name is None:
            raise CheckpointError(
                f"'{config.name}' lists layer {layer}, {component}, but there is no intkey_{styles[0]}.bin"
            )
        if not isinstance(type_name, str):
            raise CheckpointError(f"'{config.name}' gives the intervention type {type_name!r}; it must be a class name")
        found.append((name, layer, component, False, format.kind_of_class(type_name), rank, partition))
    over = files - {name for name, *_ in found}
    if over or not found:
        raise CheckpointError(f"'{config.name}' does not list {min(over) if over else 'any intervention'}")
    return found


def _representation(fields: Any) -> tuple[int, str, int | None, Any]:
    """(layer, component, rank, groups of its rows) of a representation's positional list."""
    if not isinstance(fields, list) or not 5 <= len(fields) <= _FIELDS:
        raise CheckpointError(f"a representation is {str(fields)[:120]}; it must be a list of up to {_FIELDS} fields")
    layer, component, unit, units, rank = fields[:5]
    plain = type(layer) is int and isinstance(component, str) and (rank is None or type(rank) is int)
    if not plain or unit != _UNIT or units != 1:
        raise CheckpointError(
            f"a representation is {str(fields)[:120]}; it must be a layer, a component, '{_UNIT}', 1 and a rank"
        )
    if any(value is not None for i, value in enumerate(fields) if i > 4 and i not in (_GROUP_KEY, _PARTITION)):
        raise CheckpointError(
            f"a representation is {str(fields)[:120]}; linked interventions and sources are not supported"
        )
    return layer, component, rank, fields[_PARTITION] if len(fields) > _PARTITION else None


def _named(files: dict[str, Path]) -> _Listed:
    """The same from the files' names alone: by count, as pyreft lists prefixes before suffixes, then by layer."""
    found = []
    for name in files:
        match = _FILE.fullmatch(name)
        if match is None:
            raise CheckpointError(f"'{name}' is not named as pyreft names an intervention at positions")
        layer, component, count = match.groups()
        number = int(layer) if layer else int((re.findall(r"\[(\d+)\]", component) or [0])[0])
        flat = layer is None and "." not in component
        found.append(
            ((int(count), number, component), (name, int(layer) if layer else None, component, flat, None, None, None))
        )
    return [entry for _, entry in sorted(found)]


def write(path: str | os.PathLike, entries: Sequence[Entry], model_weights: dict[str, Any] | None = None) -> None:
    """A folder that pyreft reads. Other files of an earlier save are left; an intkey file that is not part of this one goes."""
    folder = Path(path)
    settings: dict[str, Any] = {
        "intervention_constant_sources": [True] * len(entries),
        "intervention_dimensions": [entry.intervention.embed_dim for entry in entries],
        "intervention_types": [
            f"<class 'pyreft.interventions.{type(entry.intervention).__name__}'>" for entry in entries
        ],
        "mode": "parallel",
        "representations": [
            [
                entry.layer,
                entry.component,
                _UNIT,
                1,
                entry.intervention.r,
                None,
                None,
                to_pyvene(entry.intervention.partition),
                *[None] * (_FIELDS - 8),
            ]
            for entry in entries
        ],
        "sorted_keys": keys([(entry.layer, entry.component) for entry in entries]),
    }
    tensors = [format.to_tensors(entry.intervention) for entry in entries]
    with staged(folder, last=CONFIG) as staging:
        for key, state in zip(settings["sorted_keys"], tensors, strict=True):
            torch.save(state, staging / f"intkey_{key}.bin")
        if model_weights is not None:
            torch.save(model_weights, staging / MODEL_WEIGHTS)
        (staging / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    written = {f"intkey_{key}.bin" for key in settings["sorted_keys"]}
    for file in folder.glob("intkey_*.bin"):
        if file.name not in written:
            file.unlink()


def keys(places: Sequence[tuple[int | None, str]], between: str = "_") -> list[str]:
    """pyvene's key of each (layer, component): the place, and how many came before it there; "." up to pyvene 0.1.6."""
    seen: dict[str, int] = {}
    made = []
    for layer, component in places:
        words = ["comp", component.replace(".", between)] if "." in component else ["layer", layer, "comp", component]
        place = between.join(map(str, [*words, "unit", _UNIT, "nunit", 1]))
        seen[place] = seen.get(place, -1) + 1
        made.append(f"{place}#{seen[place]}")
    return made
