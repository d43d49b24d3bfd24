"""pyreft's data: locations for prompts, and prompts with completions as a data set and a collator.

The positions are pyreft's own, its counting from len - 1 in the data set classes included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets
from transformers import DataCollatorForSeq2Seq

from ..ops.subspaces import padded
from ..plan.spec import parse

IGNORE_INDEX = -100


def parse_positions(positions: str) -> tuple[int, int]:
    """(N, M) of 'fN+lM', 'fN' or 'lM'. ``ValueError`` for another text, where pyreft gives (0, 0) or the wrong count."""
    parsed = parse(positions)
    if not parsed.first and not parsed.last:
        raise ValueError(f"positions is {positions!r}; it must be 'fN', 'lM' or 'fN+lM'")
    return parsed.first, parsed.last


def get_intervention_locations(
    *,
    last_position: int,
    num_interventions: int,
    positions: str | None = None,
    first_n: int = 0,
    last_n: int = 0,
    share_weights: bool = False,
    pad_mode: str = "first",
    **_: Any,
) -> list[list[int]]:
    """The columns of each intervention in a prompt that is ``last_position`` tokens long: [intervention][position].

    f = min(N, L // 2) from the start and l = min(M, L // 2) from the end, filled up to N + M with -1 (``pad_mode`` "first")
    or with L. Without ``share_weights`` the first half of the interventions gets the prefix, the other half the suffix.
    """
    if positions is not None:
        first_n, last_n = parse_positions(positions)
    fill = -1 if pad_mode == "first" else last_position
    half = last_position // 2
    prefix = list(range(min(half, first_n)))
    suffix = list(range(last_position - min(half, last_n), last_position))
    if share_weights or not prefix or not suffix:
        together = prefix + suffix
        return [together + [fill] * (first_n + last_n - len(together))] * num_interventions
    longest = max(first_n, last_n)
    groups = [part + [fill] * (longest - len(part)) for part in (prefix, suffix)]
    return [groups[0]] * (num_interventions // 2) + [groups[1]] * (num_interventions // 2)


@dataclass
class ReftDataCollator:
    """A collator that pads the text, with ``intervention_locations`` carried along, (B, interventions, n), and ``subspaces``
    where records have them, -1 where one has fewer than another."""

    data_collator: Any

    def __call__(self, instances: Sequence[dict[str, Any]]) -> dict[str, Any]:
        chosen = [instance["subspaces"] for instance in instances if "subspaces" in instance]
        batch = self.data_collator([{k: v for k, v in each.items() if k != "subspaces"} for each in instances])
        longest = batch["input_ids"].shape[-1]
        batch["intervention_locations"] = batch["intervention_locations"][..., :longest]
        if chosen:
            every = padded([rows for own in chosen for rows in own])
            batch["subspaces"] = every.view(len(chosen), -1, every.shape[1])
        return batch


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, max_length=tokenizer.model_max_length, truncation=True)["input_ids"])


def tokenize_pair(tokenizer: Any, prompt: str, completion: str) -> tuple[list[int], list[int], int]:
    """(token ids of both, labels with the prompt as -100, tokens of the prompt alone)."""
    length = len(_tokens(tokenizer, prompt))
    ids = _tokens(tokenizer, prompt + completion)
    return ids, [IGNORE_INDEX] * min(length, len(ids)) + ids[length:], length


def _module(
    tokenizer: Any, model: Any, inputs: Sequence[str], outputs: Sequence[str], nonstop: bool, locate: Any
) -> dict:
    """``train_dataset``, ``eval_dataset`` and ``data_collator`` of prompts and completions, for a trainer."""
    if len(inputs) != len(outputs):
        raise ValueError(f"inputs has {len(inputs)} texts and outputs {len(outputs)}; each prompt needs its completion")
    columns: dict[str, list[Any]] = {"input_ids": [], "intervention_locations": [], "labels": []}
    for prompt, completion in zip(inputs, outputs, strict=True):
        ids, labels, length = tokenize_pair(tokenizer, prompt, completion + ("" if nonstop else tokenizer.eos_token))
        for column, value in zip(columns.values(), (ids, locate(length), labels), strict=True):
            column.append(value)
    pad = DataCollatorForSeq2Seq(tokenizer=tokenizer, model=model, label_pad_token_id=IGNORE_INDEX, padding="longest")
    return {
        "train_dataset": datasets.Dataset.from_dict(columns),
        "eval_dataset": None,
        "data_collator": ReftDataCollator(data_collator=pad),
    }


def make_last_position_supervised_data_module(
    tokenizer: Any,
    model: Any,
    inputs: Sequence[str],
    outputs: Sequence[str],
    num_interventions: int = 1,
    nonstop: bool = False,
) -> dict[str, Any]:
    """Prompts and completions, with every intervention at the prompt's last token.

    A completion ends with EOS unless ``nonstop``.
    """
    return _module(tokenizer, model, inputs, outputs, nonstop, lambda length: [[length - 1]] * num_interventions)


def make_multiple_position_supervised_data_module(
    tokenizer: Any,
    model: Any,
    inputs: Sequence[str],
    outputs: Sequence[str],
    positions: str = "f1+l1",
    num_interventions: int = 1,
    nonstop: bool = False,
    share_weights: bool = False,
) -> dict[str, Any]:
    """The same at ``positions``. As in pyreft, a prompt too short for them has the first token after it edited instead."""

    def locate(length: int) -> list[list[int]]:
        return get_intervention_locations(
            last_position=length,
            positions=positions,
            pad_mode="last",
            num_interventions=num_interventions,
            share_weights=share_weights,
        )

    return _module(tokenizer, model, inputs, outputs, nonstop, locate)
