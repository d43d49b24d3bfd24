"""What was trained, from its folder: with the tokenizer, the head and the dtype that its training had."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

import fastreft  # noqa: F401  # registers the method with PEFT

from .errors import UserError
from .models import adapter_config, class_for, head_settings, load_adapter, load_base, load_config, load_tokenizer
from .places import ADAPTER_CONFIG
from .run_log import read_log
from .sets.registry import CLASSIFY, GENERATE, KINDS, TAG

_KINDS = {"SEQ_CLS": CLASSIFY, "TOKEN_CLS": TAG}  # of an adapter without a log, by PEFT's name


class Trained(NamedTuple):
    """A model in evaluation, on the device that there is, and what its training's log says of it."""

    model: Any
    tokenizer: Any
    config: Any  # the model's
    kind: str
    labels: tuple[str, ...]
    log: dict[str, Any]


def is_adapter(folder: str) -> bool:
    """Or all of a model."""
    return (Path(folder).expanduser() / ADAPTER_CONFIG).is_file()


def kind_of(folder: str) -> str:
    """What it was trained to do."""
    kind = read_log(folder).get("kind")
    if kind in KINDS:
        return str(kind)
    return _KINDS.get(str(adapter_config(folder).task_type), GENERATE) if is_adapter(folder) else GENERATE


def base_of(folder: str | None, model: str | None) -> str:
    """The model that a folder's adapter is for, ``model`` if given; the folder itself where all of a model was trained."""
    if folder is not None and not is_adapter(folder):
        return folder
    named = model or (adapter_config(folder).base_model_name_or_path if folder is not None else None)
    if not named:
        raise UserError(f"the adapter in '{folder}' names no base model; give --model")
    return named


def load_trained(
    folder: str | None,
    model: str | None = None,
    *,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    kind: str | None = None,
    labels: tuple[str, ...] = (),
) -> Trained:
    """The adapter of a folder on its base, or on ``model``; all of a model that was trained; or, of no folder, ``model``.

    ``kind`` and ``labels``: what it is asked for, where the folder does not say. "auto" is the dtype of its training.
    """
    named = base_of(folder, model)
    log = {} if folder is None else read_log(folder)
    kind = kind or (GENERATE if folder is None else kind_of(folder))
    labels = tuple(log.get("labels") or labels)
    config = load_config(named, trust_remote_code)
    tokenizer = load_tokenizer(named, folder, trust_remote_code, writes=kind == GENERATE)
    made, _ = class_for(kind, config)
    dtype = dtype if dtype != "auto" else str(log.get("dtype", "auto"))
    loaded = load_base(named, dtype, trust_remote_code, kind=made, **head_settings(kind, labels, tokenizer))
    if folder is not None and is_adapter(folder):
        loaded = load_adapter(loaded, folder)
    loaded.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return Trained(loaded, tokenizer, config, kind, labels, log)
