"""Words and the tokens that stand for them: a word's tag is that of its first token.

The tokens are those of the words with blanks between them, as they would be in any text, and are found by the characters that
they cover. Given words one by one, a byte-level tokenizer (GPT-2's, SmolLM's) would leave the blanks out: tokens as the model
has never seen them, unless it was loaded with ``add_prefix_space``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .errors import UserError
from .sets import Record
from .sets.entities import OUTSIDE


def check_fast(tokenizer: Any) -> None:
    """:class:`UserError` for a tokenizer that cannot say which characters a token covers."""
    if not tokenizer.is_fast:
        raise UserError(
            f"tagging words needs a fast tokenizer, which knows the characters of each token; the model's is a "
            f"{type(tokenizer).__name__} in Python"
        )


def first_pieces(encoded: Any, i: int, record: Record) -> list[int | None]:
    """The column of each word's first token in text ``i`` of a tokenizer's answer; None for a word that was cut away or left no
    token of its own."""
    found: list[int | None] = []
    start, last = 0, -1
    for word in record.words or ():
        inside = (encoded.char_to_token(i, at) for at in range(start, start + len(word)))
        piece = next((token for token in inside if token is not None and token > last), None)
        found.append(piece)
        last = last if piece is None else piece
        start += len(word) + 1
    return found


@torch.inference_mode()
def predict_tags(
    records: Sequence[Record], model: Any, tokenizer: Any, labels: tuple[str, ...], *, batch_size: int, max_length: int
) -> list[list[str]]:
    """The likeliest tag of each word; "O" for one without a token."""
    check_fast(tokenizer)
    found = []
    for start in range(0, len(records), batch_size):
        some = records[start : start + batch_size]
        batch = tokenizer(
            [record.prompt for record in some],
            truncation=True,
            max_length=max_length,
            padding=True,
            return_tensors="pt",
        )
        best = model(**batch.to(model.device)).logits.argmax(-1).tolist()
        for i, record in enumerate(some):
            pieces = first_pieces(batch, i, record)
            found.append([OUTSIDE if piece is None else labels[best[i][piece]] for piece in pieces])
    return found
