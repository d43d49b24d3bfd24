"""Groups of an edit's r rows, by name or number, and the rows that a choice of them means. Imports neither torch nor PEFT.

groups = parse({"german": [0, 1, 2, 3], "instruct": [4, 5, 6, 7]}, r=8)
rows_of(("german",), groups, 8, "the adapter 'default'")     # (0, 1, 2, 3)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Groups = tuple[tuple[str, tuple[int, ...]], ...]
"""(name, its rows) of each group, in the order in which numbers count them; () where there are none."""
Choice = tuple[str | int, ...] | None
"""What edits one sample: groups by name or number, or rows where there are no groups; () for nothing, None for every row."""
Rows = tuple[int, ...] | None
"""The rows that a choice means; None for all of them."""


def parse(given: Any, r: int, named_as: str = "subspaces") -> Groups:
    """The groups of a configuration: {name: rows}, counted in the order of their first rows, as files keep no other, or a list
    of rows each, named "0", "1" and so on. None means none. ``ValueError`` for rows that an edit of rank ``r`` has not, or
    that are in two groups, and for names that a choice could not tell."""
    if given is None:
        return ()
    if isinstance(given, Mapping):
        named = [(name, _rows(name, rows, named_as)) for name, rows in given.items()]
        for name, _ in named:
            if not isinstance(name, str) or not name or "+" in name or name != name.strip() or name.isdigit():
                raise ValueError(
                    f"{named_as} has the name {name!r}; a name must be text without '+' that is not a number"
                )
        named.sort(key=lambda group: group[1])
    elif isinstance(given, (list, tuple)):
        named = [(str(i), _rows(i, rows, named_as)) for i, rows in enumerate(given)]
    else:
        raise ValueError(f"{named_as} is {_short(given)}; {WANTED}")
    whose: dict[int, str] = {}
    for name, rows in named:
        for row in rows:
            if not 0 <= row < r:
                raise ValueError(f"{named_as} gives {name!r} the row {row}; r is {r}, so that rows are 0 to {r - 1}")
            if row in whose:
                where = f"{whose[row]!r} and in {name!r}" if whose[row] != name else f"{name!r} twice"
                raise ValueError(f"{named_as} has the row {row} in {where}; it may be in one group, once")
            whose[row] = name
    if not named:
        raise ValueError(f"{named_as} is {_short(given)}; {WANTED}")
    return tuple(named)


def numbers_of(choice: Choice, groups: Groups, r: int, whose: str) -> list[int]:
    """A choice as numbers of groups, or of rows where there are no groups; ``ValueError`` as in :func:`rows_of`."""
    rows = rows_of(choice, groups, r, whose)
    chosen = set(range(r) if rows is None else rows)
    return [i for i, (_, own) in enumerate(groups) if chosen.issuperset(own)] if groups else sorted(chosen)


def of_pyvene(given: Any, r: int) -> Groups:
    """The groups of pyvene's ``subspace_partition``: lists of rows, two numbers being the first and the one after
    the last."""
    if not isinstance(given, (list, tuple)):
        raise ValueError(f"subspace_partition is {_short(given)}; it must be a list of groups of rows")
    return parse([_expanded(rows) for rows in given], r, "subspace_partition")


def _expanded(rows: Any) -> Any:
    pair = isinstance(rows, (list, tuple)) and len(rows) == 2 and all(type(row) is int for row in rows)
    return list(range(*rows)) if pair else rows


def to_pyvene(groups: Groups) -> list[list[int]] | None:
    """Groups as pyvene's ``subspace_partition``; ``ValueError`` for two rows that are no range, which it has no words for."""
    made = []
    for name, rows in groups:
        run = rows[-1] - rows[0] == len(rows) - 1
        if len(rows) == 2 and not run:
            raise ValueError(
                f"subspaces gives {name!r} the rows {rows[0]} and {rows[1]}, which pyvene would take for a range"
            )
        made.append([rows[0], rows[-1] + 1] if run else list(rows))
    return made or None


WANTED = 'it must be groups of rows, such as {"german": [0, 1, 2, 3], "instruct": [4, 5, 6, 7]}, or a list of them'


def _rows(name: Any, rows: Any, named_as: str) -> tuple[int, ...]:
    """Whole numbers, at least one."""
    if not isinstance(rows, Sequence) or isinstance(rows, str) or not rows or any(type(row) is not int for row in rows):
        raise ValueError(f"{named_as} gives {name!r} {_short(rows)}; {WANTED}")
    return tuple(sorted(rows))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def choice_of(given: Any) -> Choice:
    """One sample's choice: None, a number, a name, names joined by "+", or a list of them; ``ValueError`` else."""
    if given is None:
        return None
    if isinstance(given, str):
        return tuple(given.split("+")) if given else ()
    if type(given) is int:
        return (given,)
    if isinstance(given, (list, tuple)) and all(isinstance(item, str) or type(item) is int for item in given):
        return tuple(given)
    raise ValueError(f"subspaces has {_short(given)} for a sample; {ONE}")


ONE = "a sample's must be a name, names joined by '+', a number, a list of them, or None for all of the edit"


def rows_of(choice: Choice, groups: Groups, r: int, whose: str) -> Rows:
    """The rows that a choice means, ascending, each once; None where they are all r. Numbers count the groups, or the rows
    where there are no groups. ``ValueError`` for what ``whose`` edit has not."""
    if choice is None:
        return None
    known = dict(groups)
    found: set[int] = set()
    for item in choice:
        if isinstance(item, str) and item in known:
            found.update(known[item])
            continue
        number = int(item) if isinstance(item, str) and item.isdecimal() else item
        if not isinstance(number, int) or not 0 <= number < (len(groups) or r):
            has = f"the subspaces {', '.join(known)}" if groups else f"no named subspaces, and rows 0 to {r - 1}"
            raise ValueError(f"subspaces names {item!r}; {whose} has {has}")
        found.update(groups[number][1] if groups else (number,))
    return None if len(found) == r else tuple(sorted(found))
