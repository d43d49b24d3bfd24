"""What a ReFT adapter is: a ``PeftConfig``, so that it saves, loads and travels as any PEFT adapter does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft import PeftConfig, PeftType

from ..settings import EMBEDDED, EMBEDDED_PATH, ReftSettings


def _add_peft_type(name: str) -> None:
    """Give PEFT's ``PeftType`` a member: the enum is closed, and its own maps are the way in that PEFT leaves."""
    if name in PeftType.__members__:
        return
    member: Any = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType)
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member


_add_peft_type("REFT")


@dataclass
class ReftConfig(ReftSettings, PeftConfig):
    """The configuration of a ReFT adapter; each field says what it is in its ``help``.

    Raises ``ValueError`` naming the argument, what came and what is wanted.
    Source: ReFT (Wu et al. 2024, arXiv 2404.03592).
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.REFT  # type: ignore[attr-defined]
        self.check()
        if self.base_model_name_or_path == EMBEDDED:  # where it is on this machine, so that whoever loads it finds it
            self.base_model_name_or_path = str(EMBEDDED_PATH)

    def to_dict(self) -> dict[str, Any]:
        """PEFT's; the embedded model by the name that it has on every machine."""
        found = super().to_dict()
        if found.get("base_model_name_or_path") == str(EMBEDDED_PATH):
            found["base_model_name_or_path"] = EMBEDDED
        return found
