"""Writing folders so that a reader finds the old files, the new ones, or none that it could take for either."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_STAGING = ".saving-"
_OLD = ".old"  # within a staging folder: what was there before
KEPT = "README.md"  # somebody's: written where there is none, and over one of ours
OURS = "<!-- of fastreft train, which writes it anew; take this line away to keep what you change -->"


@contextmanager
def staged(folder: str | os.PathLike, last: str) -> Iterator[Path]:
    """A folder to write into; its files then take the place of those of ``folder``, and where anything fails, none does.

    Without ``last`` nobody reads the folder: it goes before the others are touched, and comes when they are there, so that
    a process that is killed in between leaves no mixture of two. What it had moved away the next to write here puts back.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _put_back_what_others_left(folder)
    with tempfile.TemporaryDirectory(dir=folder, prefix=f"{_STAGING}{os.getpid()}-{last}-") as name:
        staging = Path(name)
        yield staging
        if (folder / KEPT).exists() and OURS not in (folder / KEPT).read_text(encoding="utf-8", errors="replace"):
            (staging / KEPT).unlink(missing_ok=True)
        files = sorted(os.listdir(staging), key=lambda name: (name == last, name))
        for file in files:
            _flush(staging / file)
        _exchange(staging, folder, files)


def _exchange(staging: Path, folder: Path, files: list[str]) -> None:
    """Put files in the place of others of their names, the last of them last; all or none."""
    old = staging / _OLD
    old.mkdir()
    moved: list[str] = []
    placed: list[str] = []
    try:
        for file in reversed(files):
            if (folder / file).exists():
                os.replace(folder / file, old / file)
                moved.append(file)
        for file in files:
            os.replace(staging / file, folder / file)
            placed.append(file)
    except BaseException:
        for file in placed:
            (folder / file).unlink(missing_ok=True)
        for file in reversed(moved):
            os.replace(old / file, folder / file)
        raise
    _flush(folder)


def _put_back_what_others_left(folder: Path) -> None:
    """Clear up after writers that were killed, of whatever files; what they had moved away and not replaced is moved back."""
    for left in folder.glob(f"{_STAGING}*"):
        pid, _, rest = left.name.removeprefix(_STAGING).partition("-")
        last = rest.rpartition("-")[0]
        if pid.isdigit() and int(pid) != os.getpid() and _alive(int(pid)):
            continue
        if not (folder / last).exists() and (left / _OLD / last).exists():
            for file in sorted(os.listdir(left / _OLD), key=lambda name: (name == last, name)):
                os.replace(left / _OLD / file, folder / file)
        shutil.rmtree(left, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


def _flush(path: Path) -> None:
    """Have what was written reach the disk; where a file system cannot say so, it is left at that."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check_writable(folder: str | os.PathLike) -> None:
    """``OSError`` where nothing could be written into a folder, which need not exist; it leaves nothing there."""
    place = Path(folder).expanduser().absolute()
    while not place.exists():
        place = place.parent
    with tempfile.TemporaryFile(dir=place) as file:  # without a name, so that a kill leaves none
        file.write(b"\0" * 65536)
        file.flush()
        os.fsync(file.fileno())
