"""``fastreft das``: where a model keeps a variable, over layers and positions (:mod:`fastreft.causal`)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from ..causal import Pairs, Subspace, agreement, sweep
from ..causal.sites import find_site
from ..files import check_writable, staged
from ..models import blocks
from .errors import UserError, user_errors
from .flags.das import POSITIONS, DasArguments
from .models import BROKEN, load_base, load_config, load_tokenizer
from .read import read_records, text_of

SUMMARY, PICTURE = "das.json", "das.png"


def run(arguments: DasArguments) -> int:
    """Every cell, a table, the picture."""
    folder = Path(arguments.output_dir).expanduser()
    with user_errors(OSError, prefix=f"cannot write into '{arguments.output_dir}': "):
        check_writable(folder)
    tokenizer = load_tokenizer(arguments.model, trust_remote_code=arguments.trust_remote_code, writes=False)
    with user_errors(ValueError):
        train, test, choices = _of_task(arguments, tokenizer) if arguments.task else _of_files(arguments, tokenizer)
    model = _model(arguments)
    device = next(model.parameters()).device
    train, test = (each.encoded(lambda inputs: _moved(inputs, device)) for each in (train, test))
    positions = {text: _position(text, arguments) for text in arguments.positions or ["l1"]}
    with user_errors(ValueError):
        layers = list(range(len(blocks.find_blocks(model).names))) if arguments.layers is None else arguments.layers
        places = [layer if arguments.component == "block_output" else (layer, arguments.component) for layer in layers]
        for place in places:
            find_site(model, place)
    training: dict[str, Any] = {"steps": arguments.steps, "batch_size": arguments.batch_size, "lr": arguments.lr}
    left_out = {"output_dir", "layers", "positions", "title", "trust_remote_code", "seed", *training}
    settings = {name: value for name, value in asdict(arguments).items() if name not in left_out}
    for name in ("train_file", "test_file"):  # whose path says nothing of what it holds
        if settings[name] is not None:
            settings[f"{name}_sha256"] = hashlib.sha256(Path(settings[name]).expanduser().read_bytes()).hexdigest()
    cells = []
    print(f"{'place':>24}  {'position':>10}     IIA  seconds")
    with user_errors(ValueError, ImportError, RuntimeError):
        made = sweep(
            model,
            train,
            test,
            places,
            positions,
            _maker(arguments),
            folder,
            choices=choices,
            seed=arguments.seed,
            settings=settings,
            **training,
        )
        for cell in made:
            cells.append(cell)
            print(
                f"{cell['place']:>24}  {cell['position']:>10}  {cell['iia']:>6.3f}  {cell['seconds']:>7.1f}", flush=True
            )
    best = max(cells, key=lambda cell: cell["iia"])
    print(f"best: {best['place']} at {best['position']}, IIA {best['iia']:.3f}")
    print(f"nothing exchanged: {_unchanged(model, test, choices):.3f}")
    with staged(folder, last=SUMMARY) as staging:
        held = {"settings": asdict(arguments), "best": best, "cells": cells}
        (staging / SUMMARY).write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
    try:
        from ..causal.picture import heat_maps

        heat_maps({arguments.title: cells}, folder / PICTURE)
    except ImportError:
        print("note: no picture, as there is no matplotlib")
    return 0


@torch.no_grad()
def _unchanged(model: Any, pairs: Pairs, choices: list[int]) -> float:
    """The share of the labels that the model gives anyway."""
    from ..causal.das import answers

    return float((answers(model(**pairs.base), pairs.base, choices).argmax(-1).cpu() == pairs.labels).float().mean())


def _moved(inputs: dict[str, Tensor], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) for name, value in inputs.items()}


def _of_task(arguments: DasArguments, tokenizer: Any) -> tuple[Pairs, Pairs, list[int]]:
    """(to train on, to score on, the answers' tokens) of the template."""
    variable = arguments.variable or "number"
    causal = agreement.causal_model(agreement.known_nouns(tokenizer), variable)
    made = (
        causal.pairs(n, variable, seed).encoded(lambda setting: agreement.encode(tokenizer, setting))
        for n, seed in ((arguments.train_pairs, 2 * arguments.seed), (arguments.test_pairs, 2 * arguments.seed + 1))
    )
    train, test = made
    return train, test, agreement.choices(tokenizer, arguments.verbs)


def _of_files(arguments: DasArguments, tokenizer: Any) -> tuple[Pairs, Pairs, list[int]]:
    """The same of records. Labels are told apart by their first tokens."""
    rows = {}
    for path in (arguments.train_file, arguments.test_file):
        found = [
            [text_of(record, name, at) for name in ("base", "source", "label")]
            for at, record in read_records(str(path))
        ]
        if not found:
            raise UserError(f"'{path}' holds no pairs")
        rows[path] = found
    labels = sorted({label for found in rows.values() for _, _, label in found})
    tokens = [tokenizer(label, add_special_tokens=False)["input_ids"][0] for label in labels]
    if len(labels) < 2 or len(set(tokens)) < len(labels):
        raise UserError(f"the labels {labels[:5]} must be two at least, and differ in their first tokens")

    def encoded(texts: list[str]) -> dict[str, Tensor]:
        made = tokenizer(texts, padding=True, return_tensors="pt")
        return {name: made[name] for name in ("input_ids", "attention_mask")}

    pairs = [
        Pairs(
            encoded([base for base, _, _ in found]),
            {"": encoded([source for _, source, _ in found])},
            torch.tensor([labels.index(label) for _, _, label in found]),
        )
        for found in rows.values()
    ]
    return pairs[0], pairs[-1], tokens


def _model(arguments: DasArguments) -> Any:
    """The model, on the GPU where there is one."""
    if not arguments.random_weights:
        model = load_base(arguments.model, arguments.dtype, arguments.trust_remote_code)
    else:
        torch.manual_seed(arguments.seed)
        config = load_config(arguments.model, arguments.trust_remote_code)
        with user_errors(*BROKEN, prefix=f"cannot make a model like '{arguments.model}': "):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _position(text: str, arguments: DasArguments) -> Any:
    """An integer, a word, or what the task calls it."""
    if arguments.task is not None and text in POSITIONS:
        return POSITIONS[text]
    return int(text) if text.lstrip("-").isdecimal() else text


def _maker(arguments: DasArguments) -> Callable[[Tensor], Subspace]:
    """The subspace of a cell, from its sources' hidden states."""
    variable = (arguments.variable or "number") if arguments.task else ""
    dims: Any = {variable: arguments.dims}

    def make(values: Tensor) -> Subspace:
        if arguments.kind == "pca":
            return Subspace.pca(values, dims)
        made = Subspace(values.shape[-1], dims, "das" if arguments.kind == "random" else arguments.kind)
        made.R.requires_grad_(arguments.kind != "random")
        return made

    return make
