"""Is a text German or English? By the words that hold sentences together, of those that the other language has not."""

from __future__ import annotations

import re

GERMAN = frozenset(
    """der das und ist nicht ein eine einen einem einer eines zu den dem mit sich auf für im es auch als aus er sie dass wird
    werden bei sind noch wie über zum kann können oder zur nach wenn wurde wurden haben sein ihre seine diese dieser dieses
    keine kein ich wir durch nur vom unter mehr ihr ihren müssen sollte gibt""".split()
)
ENGLISH = frozenset(
    """the of and is are to it that for with you this not be as by or from have has can your they which their there these
    i we its if will at but one were been when would should how some into than them""".split()
)


def language_of(text: str) -> str | None:
    """ "de" or "en", whichever has more of its words in a text; None for as many, as where it has none."""
    words = re.findall(r"[^\W\d_]+", text.lower())
    german, english = (sum(word in known for word in words) for known in (GERMAN, ENGLISH))
    return None if german == english else "de" if german > english else "en"
