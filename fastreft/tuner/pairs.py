"""A ReFT adapter and another method's, LoRA's say, in one model, saved together. PEFT puts the one that is named "default" into
the folder and each other into a folder of its name in there, and loads of all that what it is asked for; but either of such a
pair without the other is a model that nobody has trained.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from peft import PeftConfig, inject_adapter_in_model
from peft.utils import load_peft_weights, set_peft_model_state_dict

LEFT = (
    "{} was saved together with {}, the {} adapter in '{}', which is not loaded with it: without it the model is another one; "
    "PeftModel.from_pretrained(model.get_base_model(), that folder, adapter_name={!r}) adds it"
)


def kind_of(folder: Any) -> str | None:
    """The PEFT type of the adapter in a folder on this machine; None where there is none."""
    try:
        found = json.loads((Path(str(folder)) / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found.get("peft_type") if isinstance(found, dict) else None


def saved_within(folder: Any) -> dict[str, str]:
    """Name -> folder of the adapters that make pairs with that of ``folder`` and are in folders of their names in there."""
    return _partners(Path(str(folder)), kind_of(folder), leave_out="")


def saved_beside(folder: Any) -> dict[str, str]:
    """As :func:`saved_within`, of the folders beside ``folder``, where that is one adapter's of several: PEFT then has the
    card with those in the folder round it."""
    path = Path(str(folder))
    if (path / "README.md").exists() or not (path.parent / "README.md").exists():
        return {}
    found = _partners(path.parent, kind_of(path), leave_out=path.name)
    root = kind_of(path.parent)
    return ({"default": str(path.parent)} if _pair(root, kind_of(path)) else {}) | found


def _partners(folder: Path, kind: str | None, leave_out: str) -> dict[str, str]:
    if kind is None or not folder.is_dir():
        return {}
    inner = {path.name: path for path in sorted(folder.iterdir()) if path.is_dir() and path.name != leave_out}
    return {name: str(path) for name, path in inner.items() if _pair(kind_of(path), kind)}


def _pair(one: str | None, other: str | None) -> bool:
    return None not in (one, other) and (one == "REFT") is not (other == "REFT")


def held_of(model: Any, folder: Any, adapter_name: str, beside: bool) -> dict[str, str]:
    """Name -> folder of the partners that a model has, which are loaded over with ``adapter_name``, as Trainer does for the
    best of several checkpoints; with ``beside``, also of a folder of its name."""
    found = saved_within(folder)
    if beside and Path(str(folder)).name == adapter_name:
        found |= saved_beside(folder)
    held = {name: model.peft_config[name] for name in found if name in model.peft_config}
    kind = model.peft_config[adapter_name].peft_type
    return {name: found[name] for name, config in held.items() if _pair(config.peft_type, kind)}


def attach(model: Any, folder: Any, is_trainable: bool) -> None:
    """Load what a pair's first adapter, just loaded into ``model``, was saved with; what the model has of its name stays."""
    for name, path in saved_within(folder).items():
        if name in model.peft_config and _pair(model.peft_config[name].peft_type, kind_of(folder)):
            continue
        config = PeftConfig.from_pretrained(path)
        config.inference_mode = not is_trainable
        inject_adapter_in_model(config, model.get_base_model(), name)
        load(model, name, path)
    if not is_trainable:
        model.eval()


def load(model: Any, adapter_name: str, folder: str) -> None:
    """A folder's tensors into an adapter that is there."""
    set_peft_model_state_dict(model, load_peft_weights(folder, device="cpu"), adapter_name=adapter_name)


def warn_of_left(model: Any, folder: Any, adapter_name: str, *, within: bool) -> None:
    """Warn of partners that a model has not."""
    for name, path in ((saved_within(folder) if within else {}) | saved_beside(folder)).items():
        if name not in (getattr(model, "peft_config", None) or {}):
            warnings.warn(
                LEFT.format(f"the adapter {adapter_name!r}", repr(name), kind_of(path), path, name), stacklevel=3
            )
