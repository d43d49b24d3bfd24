"""DAS over places and positions: a subspace and its IIA for each, kept as they come, so that a sweep goes on where it was
stopped.

A folder holds settings.json, cells.jsonl with a line a cell, and subspaces/ with a file a cell.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import staged
from .causal_model import Pairs
from .das import Das, run_sources
from .exchange import Kept
from .sites import Place, Where
from .subspace import Subspace

CELLS, SETTINGS, SUBSPACES = "cells.jsonl", "settings.json", "subspaces"
Cell = dict[str, Any]


def sweep(
    model: nn.Module,
    train: Pairs,
    test: Pairs,
    places: Sequence[Place],
    positions: Mapping[str, Where],
    make: Callable[[Tensor], Subspace],
    folder: str | os.PathLike,
    *,
    choices: Sequence[int] | None = None,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    **training: Any,
) -> Iterator[Cell]:
    """The cells, {"place", "position", "iia", "loss", "seconds"}, one after the other as they are done, or were.

    ``make`` gives a cell's subspace from the hidden states (n, k, d) of its training sources; where it has nothing to train
    it is scored as it is. ``training``: keywords of :meth:`Das.train`. ``settings``: what else the sweep is of, as JSON can
    hold it. ``ValueError`` where the folder holds a sweep of other settings, and for pairs with positions of their own.
    """
    if any(each.at is not None or each.source_at is not None for each in (train, test)):
        raise ValueError("pairs have positions of their own; a sweep gives them the positions it goes over")
    folder = Path(folder)
    done = _begun(folder, json.loads(json.dumps({**(settings or {}), **training, "seed": seed})))
    missing = {
        (place, name): (place, where)
        for place in places
        for name, where in positions.items()
        if (str(place), name) not in done
    }
    sources = [_run(model, pairs, missing) for pairs in (train, test)]
    for place in places:
        for name, where in positions.items():
            key = (place, name)
            if key in missing:
                began = time.perf_counter()
                own = [pairs._replace(sources={v: of.pop(key) for v, of in kept.items()}) for pairs, kept in sources]
                torch.manual_seed(seed)
                values = torch.cat([kept.values for kept in own[0].sources.values()])
                das = Das(model, place, make(values).to(values.device), where, choices=choices)
                trains = any(p.requires_grad for p in das.subspace.parameters())
                losses = das.train(own[0], seed=seed, **training) if trains else []
                cell = {
                    "place": str(place),
                    "position": name,
                    "iia": das.iia(own[1]),
                    "loss": losses[-1] if losses else None,
                }
                das.save(folder / SUBSPACES / f"{_file_name(place)}.{_file_name(name)}.safetensors")
                done[str(place), name] = cell | {"seconds": round(time.perf_counter() - began, 3)}
                with open(folder / CELLS, "a", encoding="utf-8") as file:
                    file.write(json.dumps(done[str(place), name]) + "\n")
            yield done[str(place), name]


def _run(
    model: nn.Module, pairs: Pairs, wanted: dict[Any, tuple[Place, Where]]
) -> tuple[Pairs, dict[str, dict[Any, Kept]]]:
    """Every source's hidden states at all places and positions, by variable: one pass of each for the whole sweep."""
    return pairs, {v: run_sources(model, source, wanted, 64) for v, source in pairs.sources.items()} if wanted else {}


def _begun(folder: Path, settings: dict[str, Any]) -> dict[tuple[str, str], Cell]:
    """The cells that a folder holds, by place and position; the settings are written where there are none."""
    if (folder / SETTINGS).exists():
        held = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        for name in sorted({*held, *settings}):
            if held.get(name) != settings.get(name):
                raise ValueError(
                    f"'{folder}' holds a sweep with {name} {held.get(name)!r}, and this one has {settings.get(name)!r}: "
                    "give another folder"
                )
    else:
        with staged(folder, last=SETTINGS) as staging:
            (staging / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    done = {}
    lines = (folder / CELLS).read_text(encoding="utf-8").split("\n") if (folder / CELLS).exists() else []
    whole = [line for line in lines[:-1] if line]  # what follows the last line's end was cut off by a kill
    for line in whole:
        cell = json.loads(line)
        done[cell["place"], cell["position"]] = cell
    if lines and lines[-1]:
        with staged(folder, last=CELLS) as staging:
            (staging / CELLS).write_text("".join(f"{line}\n" for line in whole), encoding="utf-8")
    return done


def _file_name(of: Any) -> str:
    return "".join(ch if ch.isalnum() or ch in "-_+" else "_" for ch in str(of))
