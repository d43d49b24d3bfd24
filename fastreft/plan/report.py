"""What the last forward edited, in words and numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..ops.groups import Choice


@dataclass(frozen=True)
class Edit:
    """The rows that one adapter edited at one layer: ``rows`` of them, of ``tokens`` in the batch."""

    layer: str
    adapter: str
    positions: str
    rows: int
    tokens: int
    columns: list[list[int]]
    """The edited columns of the padded input, sample by sample."""


@dataclass(frozen=True)
class ReftReport:
    """The edits of the last forward that was no decode step, how many tokens of each sample it took for the prompt, and the
    ``subspaces`` of each, where they were given: names or numbers, None for all of the edit."""

    edits: list[Edit]
    prompt_lengths: list[int]
    subspaces: list[Choice] | None = None

    def __str__(self) -> str:
        if not self.edits:
            return "the last forward edited nothing"
        lines = [f"prompt lengths: {', '.join(map(str, self.prompt_lengths))}"]
        if self.subspaces is not None:
            said = ("all" if own is None else "+".join(map(str, own)) or "none" for own in self.subspaces)
            lines.append(f"subspaces: {', '.join(said)}")
        lines += [f"{e.layer}: {e.adapter} at {e.positions}, {e.rows} of {e.tokens} rows" for e in self.edits]
        return "\n".join(lines)


def report(plans: list[Any], specs: Any) -> ReftReport:
    """Of the plans of a forward; ``specs(module, adapter)`` is (the layer's name, positions, tied), None where it has none."""
    edits: list[Edit] = []
    lengths: list[int] = []
    chosen: list[Choice] | None = None
    for plan in plans:
        if plan.seen is None:
            continue
        batch, length = plan.seen.shape if plan.seen.window is None else (plan.seen.shape[0], plan.seen.window[1])
        prompt = plan.seen.prompt
        lengths = [plan.seen.shape[1]] * batch if prompt is None else prompt.sum(1).tolist()
        chosen = None if plan.subspaces is None else plan.subspaces.over(batch)
        asked = plan.asked()
        for module, names in (plan.active or {}).items():
            for name in names:
                spec = specs(module, name)
                if spec is None or (spec[1], spec[2]) not in asked:
                    continue
                columns: list[list[int]] = [[] for _ in range(batch)]
                for rows in asked[spec[1], spec[2]]:
                    listed = range(batch * length) if rows is None else sorted(r for r in rows.tolist() if r >= 0)
                    for row in listed:
                        if chosen is None or chosen[row // length] != ():
                            columns[row // length].append(row % length)
                count = sum(map(len, columns))
                positions = "reft_positions" if plan.explicit is not None else str(spec[1])
                edits.append(Edit(spec[0], name, positions, count, batch * length, [sorted(c) for c in columns]))
    return ReftReport(edits, lengths, chosen)
