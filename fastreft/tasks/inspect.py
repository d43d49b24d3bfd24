"""``fastreft inspect``: what is in a pyreft checkpoint or an adapter of ours, without its base model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from fastreft.pyreft import checkpoint, format

from .errors import UserError, user_errors
from .flags.inspect import InspectArguments
from .models import adapter_config
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
    """(the settings, a line an intervention) of an adapter of ours."""
    config: Any = adapter_config(path)
    if not hasattr(config, "intervention_type"):
        raise UserError(f"the adapter in '{path}' is not a ReFT adapter")
    with user_errors(OSError, SafetensorError, prefix=f"cannot read the adapter in '{path}': "):
        tensors = load_file(Path(path).expanduser() / ADAPTER_WEIGHTS)
    names = ("base_model_name_or_path", "intervention_type", "r", "positions", "tied", "act_fn", "dropout")
    settings = [f"{name} {getattr(config, name)}" for name in names]
    found: dict[str, torch.nn.Module] = {}
    for key, value in tensors.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.reft\.(reft_edit|reft_suffix)\.(?:(\d+)\.)?(\w+)", key)
        if match is not None:
            which = "suffix" if match[2] == "reft_suffix" else match[3]  # of several at one place
            where = match[1] + (f" ({which})" if which else "")
            found.setdefault(where, torch.nn.Module()).register_parameter(
                match[4], torch.nn.Parameter(value, requires_grad=False)
            )
    rows = []
    for where, held in found.items():
        own = dict(held.named_parameters())
        r, d = own["R" if "R" in own else "P"].shape
        rows.append(_row(where, config.intervention_type, r, d, own.values(), format.orthonormality_error(held)))
    return settings, rows


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
