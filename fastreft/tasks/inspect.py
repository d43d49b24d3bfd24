"""``fastreft inspect``: what is in a pyreft checkpoint or an adapter of ours, without its base model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fastreft.interventions import INTERVENTIONS
from fastreft.pyreft import checkpoint, format

from ..models.components import COMPONENTS
from ..plan.spec import parse
from ..tuner import weights
from .errors import UserError, user_errors
from .flags.inspect import InspectArguments
from .models import reft_config
from .places import ADAPTER_CONFIG, ADAPTER_WEIGHTS


def pyreft_rows(path: str, intervention_type: str | None) -> list[tuple[str, ...]]:
    """A line an intervention: where, kind, rank, width, numbers, how far R is from orthonormal."""
    with user_errors(ValueError):
        entries = checkpoint.read(path, intervention_type=intervention_type)
    rows = []
    for entry in entries:
        m = entry.intervention
        where = entry.component if entry.layer is None or "." in entry.component else f"{entry.layer} {entry.component}"
        rows.append(_row(where, format.kind_of(m), m.r, m.embed_dim, m.parameters(), format.orthonormality_error(m)))
    return rows


def adapter_rows(path: str) -> tuple[list[str], list[tuple[str, ...]]]:
    """(the settings, a line an intervention) of an adapter of ours; :class:`UserError` where its file is not what they say."""
    config = reft_config(path)
    with user_errors(OSError, SafetensorError, prefix=f"cannot read the adapter in '{path}': "):
        tensors = load_file(Path(path).expanduser() / ADAPTER_WEIGHTS)
    names = ("base_model_name_or_path", "intervention_type", "r", "positions", "tied", "act_fn", "dropout")
    settings = [f"{name} {getattr(config, name)}" for name in names]
    found: dict[str, dict[str, dict[str, Tensor]]] = {}  # of each module, which of its interventions, its tensors
    others = []
    for key, value in tensors.items():
        with user_errors(ValueError, prefix=f"'{path}': "):
            weights.refuse_dtypes({key: value.dtype}, "reading")
            weights.refuse_unfinite(key, value, "reading")
        match = re.fullmatch(r"base_model\.model\.(.+)\.reft\.reft_(edit|suffix)\.(?:(\d+)\.)?([\w.]+)", key)
        if match is None:
            others.append(key)
        else:
            which = "suffix" if match[2] == "suffix" else match[3] or ""
            found.setdefault(match[1], {}).setdefault(which, {})[match[4]] = value
    if not found:
        raise UserError(f"the adapter in '{path}' holds no edit" + (f", but {others[0]}" if others else ""))
    if others:
        settings.append(f"and {len(others)} tensors that are no edit's, such as {others[0]}")
    rows = []
    for module, edits in sorted(found.items(), key=lambda item: _by_number(item[0])):
        _check_edits(path, config, module, edits)
        for which, own in edits.items():
            held = torch.nn.Module()
            for name, value in own.items():
                if "." not in name:  # an activation's parameters lie deeper
                    held.register_parameter(name, torch.nn.Parameter(value, requires_grad=False))
            r, d = own["R" if "R" in own else "P"].shape
            where = module + (f" ({which})" if which else "")
            rows.append(_row(where, config.intervention_type, r, d, own.values(), format.orthonormality_error(held)))
    return settings, rows


def _by_number(name: str) -> list[tuple[int, str]]:
    """Sorts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _check_edits(path: str, config: Any, module: str, edits: dict[str, dict[str, Tensor]]) -> None:
    """:class:`UserError` where a module's interventions are not those of the configuration."""
    shares = len(parse(config.positions).shares(config.tied))
    wanted = {*map(str, range(shares))} if config.tied == "position" else {"", "suffix"} if shares == 2 else {""}
    if {*edits} != wanted:
        raise UserError(
            f"the adapter in '{path}' has {len(edits)} interventions at {module}, and its tied {config.tied!r} with positions "
            f"{config.positions!r} means {len(wanted)}{' others' if len(edits) == len(wanted) else ''}"
        )
    is_block = module.rpartition(".")[2].isdigit()
    if config.target_modules is None and is_block is (config.component in COMPONENTS):
        raise UserError(f"the adapter in '{path}' edits {module}, which is no {config.component}, its component")
    for own in edits.values():
        matrix = own.get("R", own.get("P"))
        d = matrix.shape[1] if matrix is not None and matrix.dim() == 2 else 0
        with torch.device("meta"):
            made = INTERVENTIONS[config.intervention_type](
                embed_dim=max(d, config.r), low_rank_dimension=config.r, act_fn=config.act_fn, add_bias=config.add_bias
            ).state_dict()
        shapes = {name: tuple(value.shape) for name, value in own.items()}
        wanted_shapes = {name: tuple(value.shape) for name, value in made.items()}
        if shapes != wanted_shapes:
            odd = min(name for name in {*shapes, *wanted_shapes} if shapes.get(name) != wanted_shapes.get(name))
            raise UserError(
                f"the adapter in '{path}' is no {config.intervention_type} of rank {config.r} at {module}: its {odd} is "
                f"{shapes.get(odd, 'missing')}, and must be {wanted_shapes.get(odd, 'left out')}"
            )


def _row(where: str, kind: str, r: int, d: int, parameters: Any, error: float) -> tuple[str, ...]:
    return where, kind, str(r), str(d), f"{sum(p.numel() for p in parameters):,}", f"{error:.1e}"


def run(arguments: InspectArguments) -> int:
    """Print what is there."""
    path: Any = arguments.adapter if arguments.path is None else arguments.path
    if arguments.prompt is not None:
        from .edited import lines  # with the model's libraries, which the folder alone does not need

        print("\n".join(lines(path, arguments.model, arguments.prompt)))
        return 0
    if (Path(path).expanduser() / ADAPTER_CONFIG).is_file():
        settings, rows = adapter_rows(path)
        print("a fastreft adapter: " + ", ".join(settings))
    else:
        rows = pyreft_rows(path, arguments.intervention_type)
        print("a pyreft checkpoint; its files do not say dtype, dropout, act_fn or positions")
    table = [("where", "kind", "rank", "width", "numbers", "|R Rt - I|"), *rows]
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    for line in table:
        print("  " + "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
    return 0
