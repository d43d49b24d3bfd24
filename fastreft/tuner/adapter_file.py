"""An adapter's file without its model: the tensors of each edited module's interventions, as the configuration says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor

from ..interventions import Intervention
from ..kinds import KINDS
from ..models.components import COMPONENTS
from ..plan.spec import parse
from . import weights

_KEY = re.compile(r"base_model\.model\.(.+)\.reft\.reft_(edit|suffix)\.(?:(\d+)\.)?([\w.]+)")


class AdapterFile(NamedTuple):
    """``edits``: of each edited module, in order, which of its interventions ("", "suffix", or a position's number), a prefix's
    before its suffix's, and their tensors. ``others``: the keys of what is no edit's."""

    edits: dict[str, dict[str, dict[str, Tensor]]]
    others: list[str]


def read(folder: str | Path, config: Any) -> AdapterFile:
    """The tensors in an adapter's folder; ``ValueError`` where they are not what its ``config`` says, ``OSError`` and
    ``SafetensorError`` where there is no such file."""
    path = str(folder)
    tensors = load_file(Path(path).expanduser() / SAFETENSORS_WEIGHTS_NAME)
    found: dict[str, dict[str, dict[str, Tensor]]] = {}
    others = []
    for key, value in tensors.items():
        try:
            weights.refuse_dtypes({key: value.dtype}, "reading")
            weights.refuse_unfinite(key, value, "reading")
        except ValueError as error:
            raise ValueError(f"'{path}': {error}") from error
        match = _KEY.fullmatch(key)
        if match is None:
            others.append(key)
        else:
            which = "suffix" if match[2] == "suffix" else match[3] or ""
            found.setdefault(match[1], {}).setdefault(which, {})[match[4]] = value
    if not found:
        raise ValueError(f"the adapter in '{path}' holds no edit" + (f", but {others[0]}" if others else ""))
    for module, own in found.items():
        _check(path, config, module, own)
    edits = {module: dict(sorted(found[module].items(), key=_place)) for module in sorted(found, key=by_number)}
    return AdapterFile(edits, others)


def _place(item: tuple[str, Any]) -> int:
    """The order of a module's interventions."""
    return int(item[0]) if item[0].isdigit() else int(item[0] == "suffix")


def by_number(name: str) -> list[tuple[int, str]]:
    """Sorts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def made(config: Any, width: int) -> Intervention:
    """An intervention of a configuration."""
    return KINDS[config.intervention_type](
        embed_dim=width,
        low_rank_dimension=config.r,
        act_fn=config.act_fn,
        add_bias=config.add_bias,
        groups=config.groups(),
    )


def width_of(config: Any, tensors: dict[str, Tensor]) -> int:
    """The d of an intervention, whose tensors all have it behind, if not alone; 0 where they are none of the kind's."""
    shapes = _shapes(tensors)
    widths = sorted({shape[-1] for shape in shapes.values() if shape}, reverse=True)
    fitting = (d for d in widths if d >= config.r and _shapes(_empty(config, d)) == shapes)
    return next(fitting, 0)


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in tensors.items()}


def _empty(config: Any, width: int) -> dict[str, Tensor]:
    with torch.device("meta"):
        return made(config, width).state_dict()


def _check(path: str, config: Any, module: str, edits: dict[str, dict[str, Tensor]]) -> None:
    """``ValueError`` where a module's interventions are not those of the configuration."""
    shares = len(parse(config.positions).shares(config.tied))
    wanted = {*map(str, range(shares))} if config.tied == "position" else {"", "suffix"} if shares == 2 else {""}
    if {*edits} != wanted:
        raise ValueError(
            f"the adapter in '{path}' has {len(edits)} interventions at {module}, and its tied {config.tied!r} with positions "
            f"{config.positions!r} means {len(wanted)}{' others' if len(edits) == len(wanted) else ''}"
        )
    is_block = module.rpartition(".")[2].isdigit()
    if config.target_modules is None and is_block is (config.component in COMPONENTS):
        raise ValueError(f"the adapter in '{path}' edits {module}, which is no {config.component}, its component")
    for own in edits.values():
        if width_of(config, own):
            continue
        shapes = _shapes(own)
        wanted_shapes = _shapes(_empty(config, max([config.r, *(shape[-1] for shape in shapes.values() if shape)])))
        odd = min(name for name in {*shapes, *wanted_shapes} if shapes.get(name) != wanted_shapes.get(name))
        raise ValueError(
            f"the adapter in '{path}' is no {config.intervention_type} of rank {config.r} at {module}: its {odd} is "
            f"{shapes.get(odd, 'missing')}, and must be {wanted_shapes.get(odd, 'left out')}"
        )
