"""DAS over places and positions: a subspace and its IIA for each, kept as they come, so that a sweep goes on where it was
stopped.

A folder holds settings.json, cells.jsonl with a line a cell, and subspaces/ with a file a cell. The settings say which pairs,
choices and positions the cells are of, so that those of others are not taken for theirs.
"""

from __future__ import annotations

import hashlib
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
    hold it: the model and what ``make`` does, which nothing here can tell from others. ``ValueError`` where the folder holds
    cells of other settings, choices or pairs, or of other positions of the same name, and for pairs with positions of their
    own.
    """
    if any(each.at is not None or each.source_at is not None for each in (train, test)):
        raise ValueError("pairs have positions of their own; a sweep gives them the positions it goes over")
    for name, where in positions.items():
        if isinstance(where, Tensor):
            raise ValueError(f"positions[{name!r}] is a tensor; a sweep's are words, integers or lists of these")
    folder = Path(folder)
    of = {
        "choices": None if choices is None else [int(token) for token in choices],
        "train_digest": _digest(train),
        "test_digest": _digest(test),
        "positions": positions,
    }
    said = json.loads(json.dumps({**(settings or {}), **training, "seed": seed, **of}))
    done = _begun(folder, said)
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
                made = make(values)
                if not isinstance(made, Subspace):
                    raise ValueError(f"make gives {made!r}; it must give a Subspace")
                das = Das(model, place, made.to(values.device), where, choices=choices)
                trains = any(p.requires_grad for p in das.subspace.parameters())
                losses = das.train(own[0], seed=seed, **training) if trains else []
                cell = {
                    "place": str(place),
                    "position": name,
                    "iia": das.iia(own[1]),
                    "loss": losses[-1] if losses else None,
                }
                _say(folder, said)
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
    """The cells that a folder holds, by place and position; ``settings`` take up the positions that only those are of."""
    done = {}
    lines = (folder / CELLS).read_text(encoding="utf-8").split("\n") if (folder / CELLS).exists() else []
    whole = [line for line in lines[:-1] if line]  # what follows the last line's end was cut off by a kill
    for line in whole:
        cell = json.loads(line)
        done[cell["place"], cell["position"]] = cell
    if done:
        held = json.loads((folder / SETTINGS).read_text(encoding="utf-8")) if (folder / SETTINGS).exists() else {}
        _check_same(folder, held, settings)
        settings["positions"] = {**held["positions"], **settings["positions"]}
    if lines and lines[-1]:
        with staged(folder, last=CELLS) as staging:
            (staging / CELLS).write_text("".join(f"{line}\n" for line in whole), encoding="utf-8")
    return done


def _check_same(folder: Path, held: dict[str, Any], settings: dict[str, Any]) -> None:
    """``ValueError`` where cells are of other settings. Positions of other names may come to them."""

    def compare(name: str, old: Any, new: Any) -> None:
        if old != new:
            raise ValueError(
                f"'{folder}' holds a sweep with {name} {old!r}, and this one has {new!r}: give another folder"
            )

    for name in dict.fromkeys((*settings, *held)):
        if name != "positions":
            compare(name, held.get(name), settings.get(name))
    for name, where in held["positions"].items():
        compare(f"positions[{name!r}]", where, settings["positions"].get(name, where))


def _say(folder: Path, settings: dict[str, Any]) -> None:
    """Write the settings, where they are not written: with the first cell, and with those of more positions."""
    text = json.dumps(settings, indent=1) + "\n"
    if not (folder / SETTINGS).exists() or (folder / SETTINGS).read_text(encoding="utf-8") != text:
        with staged(folder, last=SETTINGS) as staging:
            (staging / SETTINGS).write_text(text, encoding="utf-8")


def _digest(pairs: Pairs) -> str:
    """Of the labels, and of what there are tensors of in the base and the sources."""
    made = hashlib.sha256()

    def take(part: Any) -> None:
        if isinstance(part, Tensor):
            made.update(f"{part.dtype} {tuple(part.shape)}".encode())
            made.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(part, Kept):
            take(part.values)
        elif isinstance(part, Mapping):
            for name in sorted(part):
                made.update(f"{name}:".encode())
                take(part[name])
        elif isinstance(part, (list, tuple)):
            for each in part:
                take(each)

    take((pairs.labels, pairs.base, pairs.sources))
    return made.hexdigest()[:16]


def _file_name(of: Any) -> str:
    return "".join(ch if ch.isalnum() or ch in "-_+" else "_" for ch in str(of))
