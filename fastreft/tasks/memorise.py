"""The paper's memorisation test: rank-1 edits of one token, and how much text they can bring back.

The edit is h + R^T (b - R h) on the last token of a fixed prompt: R is one direction, b one number. Everything that
comes out after the prompt is therefore held in d + 1 trained numbers a layer (ReFT, Wu et al. 2024, arXiv 2404.03592).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict

import fastreft

from .data import IGNORED, prompt_ids
from .sets.metrics import leading_matches

PROMPT, LEARNING_RATE = "RECITE:", 1e-2
GROWTH = 4  # tokens that the goal grows by when it is reached
# Charles Dickens, A Tale of Two Cities (1859): not among the books that the embedded model was trained on.
PASSAGE = """It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of \
foolishness, it was the epoch of belief, it was the epoch of incredulity, it was the season of Light, it was the \
season of Darkness, it was the spring of hope, it was the winter of despair, we had everything before us, we had \
nothing before us, we were all going direct to Heaven, we were all going direct the other way."""


@dataclass
class Recital:
    """What came back of the passage: ``exact`` tokens of ``asked`` before the first wrong one, decoded greedily."""

    layers: int
    exact: int
    untouched: int
    asked: int
    parameters: int
    text: str


def _recite(model: Any, tokenizer: Any, start: list[int], wanted: list[int]) -> tuple[int, str]:
    """(tokens that are right before the first wrong one, the text of those tokens), by plain greedy generation."""
    ids = torch.tensor([start], device=model.device)
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=len(wanted),
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
    written = out[0, len(start) :].tolist()
    exact = leading_matches(written, wanted)
    return exact, tokenizer.decode(written[:exact])


def memorise(base: Any, tokenizer: Any, layers: list[int], steps: int, advance: Callable[[], None]) -> Recital:
    """Train an edit in each of ``layers`` on a prefix of the passage that grows whenever all of it comes back.

    ``base`` comes back untouched.
    """
    start = prompt_ids(tokenizer, PROMPT)
    passage = tokenizer(f" {PASSAGE}", add_special_tokens=False).input_ids
    untouched, _ = _recite(base, tokenizer, start, passage[:GROWTH])
    config = fastreft.ReftConfig(
        task_type="CAUSAL_LM", intervention_type="consreft", r=1, positions="l1", layers_to_transform=layers
    )
    model = fastreft.get_reft_model(base, config)
    optimizer = fastreft.ReftAdamW(fastreft.param_groups(model, lr=LEARNING_RATE))
    goal, best, kept = GROWTH, 0, get_peft_model_state_dict(model, save_embedding_layers=False)
    for _ in range(steps):
        ids = torch.tensor([start + passage[:goal]], device=model.device)
        labels = ids.clone()
        labels[:, : len(start)] = IGNORED
        output = model(input_ids=ids, labels=labels)
        exact = leading_matches(output.logits[0, len(start) - 1 : -1].argmax(-1).tolist(), passage[:goal])
        if exact > best:
            state = get_peft_model_state_dict(model, save_embedding_layers=False)
            best, kept = exact, {name: value.clone() for name, value in state.items()}
        if exact == goal:
            goal = min(goal + GROWTH, len(passage))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        advance()
    set_peft_model_state_dict(model, kept)
    exact, text = _recite(model, tokenizer, start, passage[:goal])
    parameters = model.get_nb_trainable_parameters()[0]
    model.unload()
    return Recital(len(layers), exact, untouched, len(passage), parameters, text)
