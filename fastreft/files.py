"""Writing folders so that a reader never meets half a file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def staged(folder: str | os.PathLike, last: str) -> Iterator[Path]:
    """A folder to write into: its files then replace those of ``folder`` one by one, ``last`` last; none where it raises."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as staging:
        yield Path(staging)
        for name in sorted(os.listdir(staging), key=lambda name: (name == last, name)):
            os.replace(Path(staging, name), Path(folder, name))
