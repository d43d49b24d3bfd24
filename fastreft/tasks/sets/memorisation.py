"""Memorisation: how much of a text one edit of a prompt's last token can bring back (ReFT, Wu et al. 2024, appendix).

A text is asked for by a name that says nothing of it, ``ALIC#ID1->`` for ``alice_in_wonderland.txt``, as in pyreft; what comes
is compared word by word up to the first mistake. ``memorisation`` are the first 128 words of each text, ``memorisation_32`` and
so on as many as it says. The test is the training text itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError
from ..read import lines_of
from .registry import Record, register

TOKENS = 4  # of a word, on average at most: as many are written before it is judged


def memorisation(name: str, words: int) -> None:
    """Register a task of the first so many words of each text."""

    @register(name, answer_of=str.split, metrics=("prefix",), max_new_tokens=TOKENS * words, recited=True)
    def read(split: str, folder: Path | None) -> Iterator[Record]:
        paths = sorted(folder.glob("*.txt")) if folder is not None else []
        if not paths:
            raise UserError("memorisation takes texts of yours: give --data_dir, a folder of .txt files")
        for i, path in enumerate(paths, 1):
            found = " ".join(lines_of(path)).split()[:words]
            if len(found) < words:
                raise UserError(f"'{path}' has {len(found)} words, and {words} are asked for")
            text, about = " ".join(found), {"text": path.name}
            yield Record(f"{path.stem[:4].upper()}#ID{i}->", f" {text}", found, about=about, where=f"'{path}'")


memorisation("memorisation", 128)
for _words in (32, 512, 2048):
    memorisation(f"memorisation_{_words}", _words)
