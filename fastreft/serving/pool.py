"""A pool of adapters on a device: loaded, replaced and removed while others edit; what is not in use gives way.

Names point to contents. Two names of one content share its place, and a name that is given another content leaves the rows in
flight with the old one. The arenas and the table never move: a captured graph reads what they hold when it is replayed.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.pooled import Pool, edit_pooled_
from .adapter import Adapter, read
from .ranges import Ranges


class PoolFull(ValueError):
    """Adapters that do not fit into a pool, by themselves or together."""


class Resident(NamedTuple):
    """Where an adapter lies on the device: its first vector, and its first line of the table."""

    vector: int
    line: int
    adapter: Adapter


class AdapterPool:
    """``places`` as :func:`fastreft.serving.adapter.read` has them. ``vectors`` and ``lines`` are what the device has room for,
    at each of them: a LoReFT of rank r takes r vectors and
    one line, of both for its prefix and its suffix where those are not tied. ``host_bytes``: what the host keeps of adapters
    that are not on the device; others are read from their folders again.

    ``most_r``: no adapter's rank is larger. The device's memory is ``bytes``.
    """

    def __init__(
        self,
        places: Sequence[str] | int,
        width: int,
        *,
        vectors: int,
        lines: int,
        most_r: int = 64,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        host_bytes: int = 1 << 30,
    ):
        for name, value in (("vectors", vectors), ("lines", lines), ("most_r", most_r)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        self.places, self.width, self.dtype, self.most_r, self.host_bytes = (
            places,
            width,
            dtype,
            most_r,
            host_bytes,
        )
        count = places if isinstance(places, int) else len(places)
        self.A, self.U = (torch.zeros(count, vectors, width, dtype=dtype, device=device) for _ in range(2))
        self.b, self.c = (torch.zeros(count, vectors, dtype=dtype, device=device) for _ in range(2))
        self.table = torch.zeros(count, lines, 4, dtype=torch.int32, device=device)
        self._vectors, self._lines = Ranges(vectors), Ranges(lines)
        self._names: dict[str, str] = {}
        self._named: Counter[str] = Counter()  # how many names a content has
        self._folders: dict[str, tuple[Path, float]] = {}  # and the strength of what was read there
        self._host: OrderedDict[str, Adapter] = OrderedDict()  # by fingerprint, the one used last at the end
        self._host_holds = 0  # bytes
        self._resident: OrderedDict[str, Resident] = OrderedDict()  # likewise
        self._lock = threading.RLock()

    @property
    def bytes(self) -> int:
        """Of the device's memory."""
        return sum(t.nbytes for t in (self.A, self.U, self.b, self.c, self.table))

    def names(self) -> list[str]:
        """The adapters that can be asked for."""
        with self._lock:
            return sorted(self._names)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def fingerprint(self, name: str) -> str:
        """What a name stands for now; ``KeyError`` for an unknown one."""
        with self._lock:
            return self._names[self._known(name)]

    def add(self, name: str, folder: str | Path, scale: float = 1.0) -> str:
        """Have ``name`` stand for the adapter in a folder, whatever it stood for before; its fingerprint.

        ``scale``: its strength, 1 as it was trained, below 0 the other way. ``ValueError`` as
        :func:`fastreft.serving.adapter.read`, and :class:`PoolFull` where it is larger than the pool; nothing is changed then.
        """
        adapter = read(folder, self.places, self.width, self.dtype).scaled(scale)
        rank = int(adapter.lines[..., 1].max())
        if rank > self.most_r:
            raise ValueError(f"the adapter in '{folder}' has rank {rank}; the pool's most_r is {self.most_r}")
        if adapter.vectors > self._vectors.size or adapter.interventions > self._lines.size:
            raise PoolFull(
                f"the adapter in '{folder}' takes {adapter.vectors} vectors and {adapter.interventions} lines; the pool has "
                f"{self._vectors.size} and {self._lines.size}"
            )
        with self._lock:
            before = self._names.get(name)
            self._names[name] = adapter.fingerprint
            self._named[adapter.fingerprint] += 1
            self._folders[adapter.fingerprint] = Path(folder), scale
            self._keep(adapter)
            if before is not None:
                self._unname(before)
        return adapter.fingerprint

    def remove(self, name: str) -> None:
        """``name`` stands for nothing any more; ``KeyError`` where it did not."""
        with self._lock:
            self._unname(self._names.pop(self._known(name)))

    def take(self, names: Iterable[str], in_use: Iterable[str] = ()) -> dict[str, Resident]:
        """Where the adapters of a batch lie, brought to the device if need be; those of ``in_use``, fingerprints, stay.

        ``KeyError`` for an unknown name; :class:`PoolFull` where they do not fit together.
        """
        with self._lock:
            wanted = {name: self._names[self._known(name)] for name in names}
            held = {*wanted.values(), *in_use}
            return {name: self._brought(fingerprint, held) for name, fingerprint in wanted.items()}

    def at(self, place: int) -> Pool:
        """What edits the rows of a place; views, which :meth:`take` writes into."""
        return Pool(self.A[place], self.U[place], self.b[place], self.c[place], self.table[place], self.most_r)

    def edit_(self, place: int, hidden: Tensor, rows: Tensor, lines: Tensor) -> Tensor:
        """Edit rows of a place's hidden state in place; ``lines`` int64 (n,): of each row its adapter's line, -1 = none."""
        return edit_pooled_(hidden, rows, lines, self.at(place))

    # ---- within -----------------------------------------------------------------------------------------------------

    def _known(self, name: str) -> str:
        if name not in self._names:
            raise KeyError(f"there is no adapter {name!r}; there are {len(self._names)}")
        return name

    def _keep(self, adapter: Adapter) -> None:
        """Keep an adapter on the host, and as many others as there is room for; the last one always."""
        if adapter.fingerprint not in self._host:
            self._host_holds += adapter.bytes
        self._host[adapter.fingerprint] = adapter
        self._host.move_to_end(adapter.fingerprint)
        while self._host_holds > self.host_bytes and len(self._host) > 1:
            _, gone = self._host.popitem(last=False)
            self._host_holds -= gone.bytes

    def _unname(self, fingerprint: str) -> None:
        """A name less for a content: with the last it goes off the host at once, off the device when its room is wanted."""
        self._named[fingerprint] -= 1
        if self._named[fingerprint] > 0:
            return
        del self._named[fingerprint]
        del self._folders[fingerprint]
        gone = self._host.pop(fingerprint, None)
        self._host_holds -= 0 if gone is None else gone.bytes
        if fingerprint in self._resident:
            self._resident.move_to_end(fingerprint, last=False)

    def _on_host(self, fingerprint: str) -> Adapter:
        if fingerprint not in self._host:
            folder, scale = self._folders[fingerprint]
            adapter = read(folder, self.places, self.width, self.dtype).scaled(scale)
            if adapter.fingerprint != fingerprint:
                raise ValueError(f"the adapter in '{folder}' is not what was added from there; add it again")
            self._keep(adapter)
        self._host.move_to_end(fingerprint)
        return self._host[fingerprint]

    def _brought(self, fingerprint: str, held: set[str]) -> Resident:
        found = self._resident.get(fingerprint)
        if found is None:
            found = self._placed(self._on_host(fingerprint), held)
        self._resident.move_to_end(fingerprint)
        return found

    def _placed(self, adapter: Adapter, held: set[str]) -> Resident:
        """Room for an adapter, made by taking off what was used longest ago; and its weights there, the table's lines last."""
        while True:
            vector, line = self._vectors.take(adapter.vectors), self._lines.take(adapter.interventions)
            if vector is not None and line is not None:
                break
            for ranges, at, size in (
                (self._vectors, vector, adapter.vectors),
                (self._lines, line, adapter.interventions),
            ):
                if at is not None:
                    ranges.give_back(at, size)
            oldest = next((each for each in self._resident if each not in held), None)
            if oldest is None:
                raise PoolFull(
                    f"the pool has {self._vectors.size} vectors and {self._lines.size} lines, which the adapters in use fill; "
                    "make it larger, or the batch smaller"
                )
            self._take_off(oldest)
        own = slice(vector, vector + adapter.vectors)
        for arena, part in ((self.A, adapter.A), (self.U, adapter.U), (self.b, adapter.b), (self.c, adapter.c)):
            arena[:, own].copy_(part, non_blocking=True)
        lines = adapter.lines.clone()
        lines[..., 0] += vector * (lines[..., 1] > 0)
        self.table[:, line : line + adapter.interventions].copy_(lines, non_blocking=True)
        placed = self._resident[adapter.fingerprint] = Resident(vector, line, adapter)
        return placed

    def _take_off(self, fingerprint: str) -> None:
        gone = self._resident.pop(fingerprint)
        self.table[:, gone.line : gone.line + gone.adapter.interventions].zero_()
        self._vectors.give_back(gone.vector, gone.adapter.vectors)
        self._lines.give_back(gone.line, gone.adapter.interventions)
