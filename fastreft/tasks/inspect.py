"""``fastreft inspect``: what is in a pyreft checkpoint or an adapter of ours, without its base model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fastreft.pyreft import checkpoint, format

from ..tuner import adapter_file
from .errors import user_errors
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
    with (
        user_errors(OSError, SafetensorError, prefix=f"cannot read the adapter in '{path}': "),
        user_errors(ValueError),
    ):
        found = adapter_file.read(path, config)
    names = ("base_model_name_or_path", "intervention_type", "r", "positions", "tied", "act_fn", "dropout")
    settings = [f"{name} {getattr(config, name)}" for name in names]
    if found.others:
        with safe_open(Path(path).expanduser() / ADAPTER_WEIGHTS, framework="pt") as file:
            more = sum(math.prod(file.get_slice(name).get_shape()) for name in found.others)
        settings.append(
            f"and {len(found.others)} tensors that are no edit's, such as {found.others[0]}: {more:,} numbers in all"
        )
    rows = []
    for module, edits in found.edits.items():
        for which, own in edits.items():
            held = torch.nn.Module()
            for name, value in own.items():
                if "." not in name:  # an activation's parameters lie deeper
                    held.register_parameter(name, torch.nn.Parameter(value, requires_grad=False))
            made = adapter_file.made(config, adapter_file.width_of(config, own))
            where = module + (f" ({which})" if which else "")
            rows.append(
                _row(
                    where,
                    config.intervention_type,
                    made.r,
                    made.embed_dim,
                    own.values(),
                    format.orthonormality_error(held),
                )
            )
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
    total = sum(int(row[4].replace(",", "")) for row in rows)
    print(f"{len(rows)} interventions, {total:,} numbers")
    return 0
