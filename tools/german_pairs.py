"""English texts and their German translations, of the catalogs of programs: python tools/german_pairs.py OUT [FILE.mo ...]

For the task ``composition``, in place of HellaSwag_de: OUT, lines of {instruction, output}, sentences of 4 to 40 words without
markup, in an order drawn with a fixed seed. Without files, those of /usr/share/locale/de.
"""

from __future__ import annotations

import gettext
import json
import random
import re
import sys
from pathlib import Path

MARKUP = re.compile(r"[%\n<>{}|_&\\$=/`~\[\]\x04]")
WORDS = range(4, 41)


def pairs(path: Path) -> dict[str, str]:
    """What a catalog has of sentences in running words; nothing where it cannot be read."""
    try:
        with path.open("rb") as file:
            catalog = gettext.GNUTranslations(file)._catalog  # there is no other way to list one
    except (OSError, UnicodeDecodeError) as error:
        print(f"{path.name} is left out: {error}", file=sys.stderr)
        return {}
    texts = {english: german for english, german in catalog.items() if isinstance(english, str)}
    return {
        english: german
        for english, german in texts.items()
        if not MARKUP.search(english + german) and len(english.split()) in WORDS and len(german.split()) in WORDS
    }


def main(out: str, *files: str) -> None:
    """Write the file."""
    paths = [Path(file) for file in files] or sorted(Path("/usr/share/locale/de/LC_MESSAGES").glob("*.mo"))
    found: dict[str, str] = {}
    for path in paths:
        found |= pairs(path)
    rows = sorted(found.items())
    random.Random(0).shuffle(rows)
    lines = [json.dumps({"instruction": english, "output": german}, ensure_ascii=False) for english, german in rows]
    Path(out).write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(rows)} pairs of {len(paths)} catalogs in {out}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
