"""Where a model keeps its blocks. Knows torch and Transformers' conventions, nothing of PEFT."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from .components import COMPONENTS

# Models whose hints say nothing, or say it of something else: model type -> what their blocks are named.
_ODD = {
    "blt": r"model\.local_decoder\.layers\.\d+",  # the only ones that are as many as bytes, and see all before them
    "canine": r"(.*\.)?initial_char_encoder\.layer\.\d+",  # others work on every fourth character
    "flaubert": r"(.*\.)?layer_norm2\.\d+",  # no blocks, but lists of their parts; this is the last
    "funnel": r"(.*\.)?(encoder\.blocks\.0|decoder\.layers)\.\d+",  # the others pool the tokens
    "xlm": r"(.*\.)?layer_norm2\.\d+",
    "zamba": r"(.*\.)?layers\.\d+",  # what is recorded lies within a block for some
    "zamba2": r"(.*\.)?layers\.\d+",
}

# Models that cannot be edited: model type -> why.
UNSUPPORTED = {
    "perceiver": "its blocks work on latents, not on tokens",
    "qwen4_exp": "its hidden state is several residual streams side by side, wider than the hidden size",
    "qwen4_exp_text": "its hidden state is several residual streams side by side, wider than the hidden size",
    "reformer": "its reversible blocks rebuild their inputs from their outputs, which an edit changes",
    "squeezebert": "it calls its blocks' forward past every hook",
}


@dataclass(frozen=True)
class Blocks:
    """The blocks of a model in order: their ``names`` in it, the ``modules``, and what told that they are the blocks."""

    names: list[str]
    modules: list[nn.Module]
    source: str


def find_blocks(model: nn.Module) -> Blocks:
    """The repeated transformer blocks of a model, in order. ``ValueError`` where there is none.

    Asked in this order: a table of odd models; the class that Transformers records as ``hidden_states``
    (``_can_record_outputs``); the longest ``nn.ModuleList`` of classes that ``_no_split_modules`` names; the longest
    one whose members share a class, lists within a block (experts) left out. An encoder-decoder gives its encoder,
    a model of several modalities its language model; the longest and then the first wins among what is left.
    """
    reason = UNSUPPORTED.get(_model_type(model))
    if reason is not None:
        raise ValueError(f"{type(model).__name__} cannot be edited: {reason}")
    tabled = _tabled(model)
    if tabled:
        return Blocks([name for name, _ in tabled], [module for _, module in tabled], "a table of odd models")
    sources = {source: [group for group in find(model) if group] for source, find in _SOURCES.items()}
    for root in dict.fromkeys((_root(model), "")):
        for source, groups in sources.items():
            inside = [group for group in groups if _is_in(group[0][0], root)]
            if inside:
                found = max(inside, key=len)
                return Blocks([name for name, _ in found], [module for _, module in found], source)
    raise ValueError(
        f"no repeated blocks found in {type(model).__name__}: it has no nn.ModuleList whose members share a class; "
        "name the modules to edit with target_modules"
    )


Group = list[tuple[str, nn.Module]]


def _model_type(model: Any) -> str:
    return getattr(getattr(model, "config", None), "model_type", "")


def _root(model: Any) -> str:
    """The name of the part of a model that holds the blocks meant: an encoder-decoder's encoder, else its decoder."""
    config = getattr(model, "config", None)
    get = getattr(model, "get_encoder" if getattr(config, "is_encoder_decoder", False) else "get_decoder", None)
    part = get() if get is not None else model
    return next((name for name, module in model.named_modules() if module is part), "")


def _is_in(name: str, root: str) -> bool:
    return not root or name.startswith(f"{root}.")


def _tabled(model: nn.Module) -> Group:
    pattern = _ODD.get(_model_type(model))
    return [(name, m) for name, m in model.named_modules() if pattern is not None and re.fullmatch(pattern, name)]


def _recorded(model: nn.Module) -> Iterator[Group]:
    """A group for each model within the model: its modules that Transformers records as hidden states."""
    models = [(name, m) for name, m in model.named_modules() if hasattr(type(m), "_can_record_outputs")]
    for owner, inner in models:
        recorders = (getattr(inner, "_can_record_outputs", None) or {}).get("hidden_states") or ()
        recorders = recorders if isinstance(recorders, list) else [recorders] if recorders else []
        nested = [name for name, _ in models if name != owner and _is_in(name, owner)]
        yield [
            (name, module)
            for name, module in model.named_modules()
            if name != owner
            and _is_in(name, owner)
            and not any(name == other or _is_in(name, other) for other in nested)
            and any(_is_recorded(recorder, name, module) for recorder in recorders)
        ]


def _is_recorded(recorder: Any, name: str, module: nn.Module) -> bool:
    """Transformers' own rule for a recorder: a class, the end of a module's name, or both under a layer's name."""
    target = getattr(recorder, "target_class", recorder)
    ending = getattr(recorder, "class_name", None)
    layer = getattr(recorder, "layer_name", None)
    if isinstance(target, str):
        target, ending = None, target
    if not ((target is not None and isinstance(module, target)) or (ending is not None and name.endswith(ending))):
        return False
    return layer is None or f".{layer.strip('.')}." in f".{name}."


def _lists(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if _is_list(module)]


def _is_list(module: nn.Module) -> bool:
    """A list of modules, but not one of lists."""
    return isinstance(module, nn.ModuleList) and not any(isinstance(inner, nn.ModuleList) for inner in module)


def _unsplit(model: nn.Module) -> Iterator[Group]:
    """The lists of classes that Transformers keeps on one device."""
    hints = set(getattr(model, "_no_split_modules", None) or ())
    for name, blocks in _lists(model):
        if all(type(block).__name__ in hints for block in blocks):
            yield [(f"{name}.{i}", block) for i, block in enumerate(blocks)]


def _alike(model: nn.Module) -> Iterator[Group]:
    """The lists whose members share a class, without those inside another."""
    lists = [(name, blocks) for name, blocks in _lists(model) if len({type(block) for block in blocks}) == 1]
    for name, blocks in lists:
        if not any(_is_in(name, other) for other, _ in lists):
            yield [(f"{name}.{i}", block) for i, block in enumerate(blocks)]


_SOURCES = {
    "_can_record_outputs": _recorded,
    "_no_split_modules": _unsplit,
    "a list of equal modules": _alike,
}


def component_of(name: str, block: nn.Module, component: str) -> tuple[str, nn.Module]:
    """(name, module) of a block's MLP or attention; ``ValueError`` naming what the block has where it is not found."""
    for path in COMPONENTS[component]:
        try:
            return f"{name}.{path}", block.get_submodule(path)
        except AttributeError:
            continue
    inside = ", ".join(inner for inner, _ in block.named_children()) or "nothing"
    raise ValueError(
        f"component is {component!r}, but {name} ({type(block).__name__}) has none that is known; it has {inside}: "
        "name the modules to edit with target_modules"
    )


def makes_its_output(block: nn.Module) -> bool:
    """Is a block's output surely a tensor of its own, which nothing keeps? That of all in Transformers' own code is."""
    somebodys = "forward" in block.__dict__ and not hasattr(block, "_hf_hook")  # accelerate puts its own round the same
    return type(block).forward.__module__.startswith("transformers.") and not somebodys


def hidden_size(model: nn.Module, name: str = "") -> int:
    """The width d of the hidden state at the module ``name``: what the config nearest above it says.

    ``ValueError`` where none does.
    """
    for config in configs_above(model, name):
        for field in ("hidden_size", "n_embd", "d_model"):
            size = getattr(config, field, None)
            if isinstance(size, int):
                return size
    raise ValueError(
        f"the hidden size of {type(model).__name__} is unknown: its config has none of hidden_size, n_embd and d_model"
    )


def configs_above(model: nn.Module, name: str) -> Iterator[Any]:
    """The configs of the modules that hold the module ``name``, the nearest first; of the model's, its text's."""
    parts = name.split(".")
    for i in range(len(parts) - 1, -1, -1):
        config = getattr(model.get_submodule(".".join(parts[:i])), "config", None)
        if config is not None:
            yield config if i or not hasattr(config, "get_text_config") else config.get_text_config()
