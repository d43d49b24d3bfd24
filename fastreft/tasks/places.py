"""Where models and adapters are: the package's own model, folders, names on a hub. Imports nothing that takes time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..settings import EMBEDDED, EMBEDDED_PATH
from .errors import UserError

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MODEL_CONFIG, MODEL_WEIGHTS = "config.json", "model.safetensors"


def find_model(model: str) -> tuple[str, dict[str, Any]]:
    """(what to load, keywords for ``from_pretrained``) for a folder, a hub id or "embedded".

    A folder that exists is never looked up on a hub; a name that can only be a path must exist.
    """
    if not model:
        raise UserError("model is empty; give a folder, a name on a hub, or 'embedded'")
    if model in (EMBEDDED, str(EMBEDDED_PATH)):
        return str(EMBEDDED_PATH), {"local_files_only": True}
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / MODEL_CONFIG).is_file():
            raise UserError(f"the model folder '{model}' has no {MODEL_CONFIG}")
        return str(path), {"local_files_only": True}
    if path.exists():
        raise UserError(f"the model '{model}' is a file; give the folder that holds it and its {MODEL_CONFIG}")
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise UserError(f"there is no model folder '{model}'")
    return model, {}


def find_trained(folder: str) -> Path:
    """The folder of an adapter or, where all of a model was trained, of that; :class:`UserError` where there is neither."""
    path = Path(folder).expanduser()
    return path if folder and (path / MODEL_CONFIG).is_file() else find_adapter(folder)


def find_adapter(adapter: str) -> Path:
    """The folder of an adapter; :class:`UserError` where there is none."""
    path = Path(adapter).expanduser()
    if not (path / ADAPTER_CONFIG).is_file():
        raise UserError(f"there is no adapter in '{adapter}' (no {ADAPTER_CONFIG})")
    return path
