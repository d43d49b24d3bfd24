"""Subject-verb agreement as a causal model: "The keys near the cabinet" goes on with "are", as its subject is plural.

    noun   number   place   other   other number
             |
            verb

Nouns and their plurals are words that a tokenizer has as one token each, so that all prompts have five: The, the subject, a
preposition, the, the other noun. The exchanged variable is ``number``; ``other_number`` is a wrong one, which the verb does not
follow, for a control. After CausalGym's tasks (Arora et al. 2024, arXiv 2402.12560), whose prompts are SyntaxGym's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .causal_model import CausalModel, Setting

NOUNS = (
    "key cabinet dog cat boy girl author teacher car book picture door window student doctor farmer pilot senator "
    "letter table tree house friend mother father sister brother lawyer painter singer player writer driver guard "
    "judge king queen bird horse cow song poem movie photo report chair lamp road river bridge garden kitchen "
    "office school shop store hotel museum hand eye word day thing stone ship leaf flower horse prince princess "
    "soldier son daughter stranger animal servant place room"
).split()
PLACES = "near behind by with".split()
VERBS = ("is", "are")


def causal_model(nouns: list[str], variable: str = "number") -> CausalModel:
    """The verb's number by ``number``, or, as the wrong model has it, by ``other_number``."""
    if variable not in ("number", "other_number"):
        raise ValueError(f"variable is {variable!r}; it must be 'number' or 'other_number'")
    inputs: dict[str, list[Any]] = {
        "noun": nouns,
        "number": [0, 1],
        "place": PLACES,
        "other": nouns,
        "other_number": [0, 1],
    }
    parents: dict[str, list[str]] = {name: [] for name in inputs}
    return CausalModel({**parents, "verb": [variable]}, {"verb": lambda number: number}, inputs)


def known_nouns(tokenizer: Any) -> list[str]:
    """The nouns of which the tokenizer has both forms as one token. ``ValueError`` where they are fewer than five."""
    known = [
        noun for noun in dict.fromkeys(NOUNS) if all(len(_ids(tokenizer, f" {noun}{end}")) == 1 for end in ("", "s"))
    ]
    if len(known) < 5:
        raise ValueError(f"the tokenizer has {len(known)} of the task's nouns as single tokens; five are needed")
    return known


def texts(setting: Setting) -> list[str]:
    """The prompts of a setting."""
    columns = (setting[name] for name in ("noun", "number", "place", "other", "other_number"))
    return [
        f"The {noun}{'s' * int(number)} {place} the {other}{'s' * int(other_number)}"
        for noun, number, place, other, other_number in zip(*map(np.atleast_1d, columns), strict=True)
    ]


def encode(tokenizer: Any, setting: Setting) -> dict[str, Tensor]:
    """The prompts as a model's inputs, all of one length."""
    ids = torch.tensor(tokenizer(texts(setting))["input_ids"])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def choices(tokenizer: Any, verbs: Sequence[str] = VERBS) -> list[int]:
    """The tokens of the verbs, singular and plural. ``ValueError`` where one is several tokens."""
    found = [_ids(tokenizer, f" {verb}") for verb in verbs]
    if any(len(ids) != 1 for ids in found):
        raise ValueError(f"verbs is {verbs}; the tokenizer has not each as one token")
    return [ids[0] for ids in found]


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]
