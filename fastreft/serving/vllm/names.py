"""What a request names: a model that is an adapter, or an adapter by our argument; without vLLM."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from .shelf import ARGUMENT, STRENGTH, Shelf, short

KNOWN = (ARGUMENT, STRENGTH)
MOST = 1000  # a strength: no adapter means anything long before


def named(extra: Mapping[str, Any], model: str | None = None) -> Any:
    """The adapter that a request asks for, by its model or by its extra argument; None for the base model.

    ``ValueError`` where the two are not the same, and for an argument that is nearly ours: what is not known would not be done.
    """
    unknown = next((key for key in extra if key not in KNOWN and key.casefold().startswith(ARGUMENT)), None)
    if unknown is not None:
        raise ValueError(
            f"there is no argument {short(unknown)} of an adapter's; it is '{ARGUMENT}', an adapter's name, or '{STRENGTH}'"
        )
    if ARGUMENT not in extra:
        return model
    name = extra[ARGUMENT]
    if model is not None and name != model:
        raise ValueError(
            f"the model is the adapter {short(model)}, and '{ARGUMENT}' names {short(name)}; give one of them"
        )
    if name is None:
        raise ValueError(f"'{ARGUMENT}' is null; leave it out for the base model")
    return name


def strength(extra: Mapping[str, Any], name: Any) -> float:
    """How strong a request wants its adapter ``name``, 1 where it does not say; ``ValueError`` for what is no such number, and
    where there is no adapter."""
    if STRENGTH not in extra:
        return 1.0
    asked = extra[STRENGTH]
    if isinstance(asked, bool) or not isinstance(asked, (int, float)) or not abs(asked) <= MOST:
        raise ValueError(f"'{STRENGTH}' is {short(asked)}; it must be a number from -{MOST} to {MOST}")
    if name is None:
        raise ValueError(f"'{STRENGTH}' is {short(asked)}, and the request names no adapter")
    return float(asked)


class Names(dict[str, Any]):
    """vLLM's LoRAs by name, and behind a name that is none of them nor a base model's, our adapters, each as ``made`` makes it.

    To go through it is to go through the LoRAs: vLLM does so for those that it applies unasked, by the kinds of a message's
    contents, and ours are asked for."""

    def __init__(self, loras: Mapping[str, Any], shelf: Shelf, base: Collection[str], made: Callable[[str, str], Any]):
        super().__init__(loras)
        self.shelf, self.base, self.made = shelf, base, made

    def served(self) -> list[str]:
        """The adapters that can be asked for."""
        return [name for name in self.shelf.names() if self.adapter(name)]

    def adapter(self, name: Any) -> str | None:
        """``name`` where it is one of our adapters."""
        return name if name in self.shelf and name not in self.base and not super().__contains__(name) else None

    def __contains__(self, name: Any) -> bool:
        return super().__contains__(name) or self.adapter(name) is not None

    def __missing__(self, name: str) -> Any:
        return self.made(name, str(self.shelf.folder / name))
