"""pyreft's words for places in a model: "block_output", "mlp_output", "model.layers[3].self_attn.output".

A place is a module's name and a side of it; the words are read for the model at hand.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from ..models.blocks import component_of, find_blocks
from ..models.components import COMPONENTS
from .format import CheckpointError

_SIDES = ("output", "input")
# The model classes for which pyvene knows "block_output" and so on; for others it needs a path.
_KNOWN = re.compile(
    "(GPTNeo|GPTNeoX|Mistral|Gemma2|Olmo)(Model|ForCausalLM)|GPT2(Model|LMHeadModel|ForSequenceClassification)"
    "|(Llama|Gemma|Qwen2)(Model|ForCausalLM|ForSequenceClassification)"
)


@dataclass(frozen=True)
class Place:
    """A side, "output" or "input", of the module of that name."""

    name: str
    side: str


def block_names(model: nn.Module) -> list[str]:
    """The names of a model's blocks, in order."""
    return find_blocks(model).names


def locate(model: nn.Module, layer: int | None, component: str) -> Place:
    """The place that a representation means; ``ValueError`` where the model has no such place."""
    path, _, side = component.rpartition(".")
    if path:
        name = re.sub(r"\[(\d+)\]", r".\1", path)
        if side not in _SIDES or not _has(model, name):
            raise CheckpointError(
                f"component is {component!r}; {type(model).__name__} has no such module, "
                "or the path does not end in .output or .input"
            )
        return Place(name, side)
    part, _, side = component.rpartition("_")
    if side not in _SIDES or f"{part}_output" not in ("block_output", *COMPONENTS):
        raise CheckpointError(
            f"component is {component!r}; it must be block, mlp or attention with _output or _input, "
            "or a module's path with .output or .input, such as 'model.layers[3].self_attn.o_proj.output'"
        )
    names = block_names(model)
    if not isinstance(layer, int) or not 0 <= layer < len(names):
        raise CheckpointError(f"layer is {layer!r}; {type(model).__name__} has layers 0 to {len(names) - 1}")
    name = names[layer]
    if part != "block":
        try:
            name, _ = component_of(name, model.get_submodule(name), f"{part}_output")
        except ValueError as error:
            raise CheckpointError(str(error)) from error
    return Place(name, side)


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def unflatten(model: nn.Module, flat: str) -> str:
    """The path whose dots became underscores in a file's name: "model_layers[3]_output" -> "model.layers[3].output"."""
    for name, _ in model.named_modules():
        path = bracketed(name)
        for side in _SIDES:
            if f"{path}.{side}".replace(".", "_") == flat:
                return f"{path}.{side}"
    raise CheckpointError(f"a file is named for the component {flat!r}, which {type(model).__name__} does not have")


def bracketed(name: str) -> str:
    """A module's name as pyvene writes it: "model.layers.3.mlp" -> "model.layers[3].mlp"."""
    return re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", name)


def describe(model: nn.Module, place: Place) -> tuple[int, str]:
    """(layer, component) of a place, in the words that pyvene knows for this model; else a path, which its load cannot size."""
    blocks = find_blocks(model)
    for layer, (name, block) in enumerate(zip(blocks.names, blocks.modules, strict=True)):
        if not f"{place.name}.".startswith(f"{name}."):
            continue
        if _KNOWN.fullmatch(type(model).__name__):
            for part, found in _parts(name, block).items():
                if found == place.name:
                    return layer, f"{part}_{place.side}"
        return layer, f"{bracketed(place.name)}.{place.side}"
    number = re.search(r"\.(\d+)(?:\.|$)", place.name)
    return int(number[1]) if number else 0, f"{bracketed(place.name)}.{place.side}"


def _parts(name: str, block: nn.Module) -> dict[str, str]:
    """A block's name, and its MLP's and its attention's, by pyvene's words."""
    return {"block": name} | {word.removesuffix("_output"): component_of(name, block, word)[0] for word in COMPONENTS}
