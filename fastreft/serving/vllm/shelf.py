"""The adapters that requests may name: a folder of them, and of each that was asked for a copy that does not change."""

from __future__ import annotations

import atexit
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..adapter import read
from . import environment

ARGUMENT = (
    "reft"  # of a request's extra_args: an adapter's name, and for the workers (its name in the pool, folder, strength)
)
STRENGTH = "reft_scale"  # likewise: how strong the adapter edits
FILES = ("adapter_config.json", "adapter_model.safetensors")
KEPT = 24 * 3600.0  # seconds that a copy outlives its last request, where its name stands for something else

Marks = tuple[tuple[int, int, int], ...]


class Shelf:
    """The adapters in a folder, a folder each; what begins with a dot is none. What was asked for is copied aside under its
    fingerprint: the workers read the copy, whatever becomes of the folder meanwhile. May be asked from several threads."""

    def __init__(self, folder: Path, layers: int, width: int, most_r: int):
        self.folder, self.layers, self.width, self.most_r = folder, layers, width, most_r
        self.copies = Path(tempfile.mkdtemp(prefix="fastreft-served-"))
        atexit.register(shutil.rmtree, self.copies, ignore_errors=True)
        self._lock = threading.Lock()
        self._known: dict[str, tuple[Marks, str]] = {}  # name -> (its files' marks, fingerprint)
        self._asked: dict[str, float] = {}  # fingerprint -> when it was asked for last

    def names(self) -> list[str]:
        """The adapters that there are now."""
        return sorted(name for name in (path.parent.name for path in self.folder.glob(f"*/{FILES[0]}")) if name in self)

    def __contains__(self, name: Any) -> bool:
        if not isinstance(name, str) or not name or name.startswith(".") or Path(name).name != name:
            return False
        try:
            return (self.folder / name / FILES[0]).is_file()
        except OSError:  # a name that is too long for a file's
            return False

    def find(self, name: Any) -> tuple[str, str]:
        """(fingerprint, folder of the copy); ``ValueError`` for a name that there is not, and for an adapter that is spoilt or
        not this model's."""
        if name not in self:
            raise ValueError(f"there is no adapter {short(name)}; there are {len(self.names())}")
        with self._lock:
            marks = self._marks(name)
            known = self._known.get(name)
            if known is None or known[0] != marks or not (self.copies / known[1] / FILES[0]).is_file():
                known = self._known[name] = self._copied(name, marks)
                self._forget(time.monotonic() - KEPT)
            self._asked[known[1]] = time.monotonic()
            return known[1], str(self.copies / known[1])

    def _marks(self, name: str) -> Marks:
        """What changes when the files do."""

        def of_files() -> Iterator[tuple[int, int, int]]:
            for file in FILES:
                try:
                    found = (self.folder / name / file).stat()
                except OSError:
                    yield 0, 0, 0
                else:
                    yield found.st_ino, found.st_size, found.st_mtime_ns

        return tuple(of_files())

    def _copied(self, name: str, marks: Marks) -> tuple[Marks, str]:
        staging = Path(tempfile.mkdtemp(dir=self.copies))
        try:
            while True:
                for file in FILES:
                    if (self.folder / name / file).is_file():
                        shutil.copy(self.folder / name / file, staging / file)
                before, marks = marks, self._marks(name)
                if marks == before:  # else the configuration may be of one adapter and the weights of the next
                    break
            adapter = read(staging, self.layers, self.width)
            rank = int(adapter.lines[..., 1].max())
            if rank > self.most_r:
                raise ValueError(f"has rank {rank}; FASTREFT_MOST_R is {self.most_r}")
        except (ValueError, OSError) as error:
            shutil.rmtree(staging)
            said = str(error).replace(str(staging), name)
            raise ValueError(f"the adapter '{name}' cannot be served: {said}") from None
        target = self.copies / adapter.fingerprint
        if target.exists():
            shutil.rmtree(staging)
        else:
            staging.rename(target)
        return marks, adapter.fingerprint

    def _forget(self, before: float) -> None:
        """Take away the copies that nobody has asked for since and no name stands for."""
        self._known = {name: known for name, known in self._known.items() if name in self}
        named = {fingerprint for _, fingerprint in self._known.values()}
        for fingerprint in [each for each, asked in self._asked.items() if asked < before and each not in named]:
            del self._asked[fingerprint]
            shutil.rmtree(self.copies / fingerprint, ignore_errors=True)


def shelf_of(processor: Any) -> Shelf:
    """The adapters that an ``InputProcessor``'s requests may name."""
    shelf = processor.__dict__.get("_reft_shelf")
    if shelf is None:
        model = processor.model_config
        layers, width = model.get_total_num_hidden_layers(), model.get_hidden_size()
        shelf = processor._reft_shelf = Shelf(Path(str(environment.adapters())), layers, width, environment.most_r())
    return shelf


def short(name: Any) -> str:
    """What was asked for, as a sentence may have it."""
    said = ascii(name)
    return said if len(said) <= 80 else f"{said[:77]}..."
