"""Runs of numbers out of [0, size), taken and given back."""

from __future__ import annotations


class Ranges:
    """The first run that is long enough is taken; neighbours that are free are one again."""

    def __init__(self, size: int):
        self.size = size
        self._free = [(0, size)]  # (start, end), in order

    def take(self, count: int) -> int | None:
        """The start of ``count`` numbers that are free; None where there is no such run."""
        for i, (start, end) in enumerate(self._free):
            if end - start >= count:
                self._free[i : i + 1] = [(start + count, end)] if end - start > count else []
                return start
        return None

    def give_back(self, start: int, count: int) -> None:
        """Free what :meth:`take` gave."""
        joined: list[tuple[int, int]] = []
        for run in sorted([*self._free, (start, start + count)]):
            if joined and joined[-1][1] == run[0]:
                joined[-1] = (joined[-1][0], run[1])
            else:
                joined.append(run)
        self._free = joined
