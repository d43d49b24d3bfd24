"""Sweeps of `fastreft das` side by side in one picture, by the titles that they were given.

python examples/das_maps.py docs/das-number.png das-number das-random das-wrong das-untrained
"""

import json
import sys
from pathlib import Path

from fastreft.causal.picture import heat_maps


def main(picture: str, *folders: str) -> None:
    held = [json.loads((Path(folder) / "das.json").read_text(encoding="utf-8")) for folder in folders]
    heat_maps({each["settings"]["title"]: each["cells"] for each in held}, picture)


if __name__ == "__main__":
    main(*sys.argv[1:])
