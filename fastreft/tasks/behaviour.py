"""A behaviour to teach a small model: a sentence about somebody becomes that somebody's own words.

    The old king was hungry.   ->   "I am hungry," said the old king.

The sentences are put together here from short lists of words, and speakers are held out: no (adjective, noun) pair of
the held-out sentences is in a training sentence.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import DataCollatorForSeq2Seq

from .data import IGNORED, encode, prompt_ids
from .generate import complete

ADJECTIVES = "old young little poor great good wise brave tall kind strange white".split()
NOUNS = "king queen boy girl man woman dog cat horse lion bear rabbit bird prince captain soldier".split()
STATES = "hungry tired happy sad cold afraid angry thirsty alone sleepy ready sorry glad lost".split()
THINGS = "horse house boat ship garden dog book hat tree river fire bed letter door".split()
PREDICATES = (  # of the sentence, and of the speech
    [(f"was {state}", f"am {state}") for state in STATES]
    + [(f"wanted a {thing}", f"want a {thing}") for thing in THINGS]
    + [(f"had no {thing}", f"have no {thing}") for thing in THINGS]
)


@dataclass(frozen=True)
class Example:
    """A sentence, and the same as speech."""

    prompt: str
    completion: str


@dataclass
class Metrics:
    """Over the held-out sentences: loss and accuracy of the completions' tokens, and how many are right as a whole."""

    loss: float
    token_accuracy: float
    exact: float


def examples(seed: int, held_out: int) -> tuple[list[Example], list[Example]]:
    """(every training sentence, ``held_out`` held-out ones), in an order that the seed gives."""
    rng = random.Random(seed)
    speakers = list(itertools.product(ADJECTIVES, NOUNS))
    rng.shuffle(speakers)
    cut = len(speakers) // 4
    train, test = (
        [
            Example(f"The {adjective} {noun} {told}.", f' "I {said}," said the {adjective} {noun}.')
            for (adjective, noun), (told, said) in itertools.product(group, PREDICATES)
        ]
        for group in (speakers[cut:], speakers[:cut])
    )
    rng.shuffle(train)
    return train, rng.sample(test, held_out)


def collate(tokenizer: Any, batch: Sequence[Example], device: torch.device) -> dict[str, torch.Tensor]:
    """Right-padded ids, mask and labels on the device."""
    encoded = [encode(tokenizer, example.prompt, example.completion) for example in batch]
    return {name: values.to(device) for name, values in DataCollatorForSeq2Seq(tokenizer)(encoded).items()}


def train(
    model: Any,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[dict[str, torch.Tensor]],
    advance: Callable[[], None],
) -> float:
    """A step a batch, with the learning rate falling to 0 in a line; the median milliseconds of a step."""
    schedule = LambdaLR(optimizer, lambda step: min((step + 1) / 10, 1 - step / len(batches)))
    model.train()
    times = []
    for batch in batches:
        start = perf_counter()
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
        schedule.step()
        times.append(1000 * (perf_counter() - start))
        advance()
    model.eval()
    return median(times)


@torch.inference_mode()
def evaluate(model: Any, tokenizer: Any, held_out: Sequence[Example]) -> tuple[Metrics, list[str]]:
    """The metrics, and what the model writes after each sentence."""
    batch = collate(tokenizer, held_out, model.device)
    logits, labels = model(**batch).logits[:, :-1], batch["labels"][:, 1:]
    counted = labels != IGNORED
    loss = torch.nn.functional.cross_entropy(logits[counted].float(), labels[counted])
    right = (logits[counted].argmax(-1) == labels[counted]).float().mean()
    prompts = [prompt_ids(tokenizer, example.prompt) for example in held_out]
    texts = complete(
        model, tokenizer, prompts, batch_size=len(prompts), max_new_tokens=batch["labels"].shape[1], do_sample=False
    )
    exact = sum(text.strip() == example.completion.strip() for text, example in zip(texts, held_out, strict=True))
    return Metrics(loss.item(), right.item(), exact / len(held_out)), texts
