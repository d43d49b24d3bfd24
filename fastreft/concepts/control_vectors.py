"""Control vectors, one a layer, in the GGUF files of llama.cpp and repeng; of adapters whose edit is a vector."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..files import staged
from ..interventions import LobireftIntervention
from ..kinds import BiasIntervention
from ..models.blocks import find_blocks
from ..ops.activations import torch_fn
from ..tuner.loading import layers_of
from .added import with_vectors

ARCH = "controlvector"


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ImportError("control vectors in GGUF need the package gguf: pip install gguf") from error
    return gguf


@torch.no_grad()
def vectors_of(model: nn.Module, adapter_name: str = "default") -> dict[int, Tensor]:
    """Layer -> what an adapter adds to its output, (d,) fp32 on the CPU.

    ``ValueError`` where it adds anything else than one vector: of all kinds but ``bias`` and ``lobireft``, where prefix and
    suffix have one each, and of a block's input or of modules that are no blocks.
    """
    found: dict[int, Tensor] = {}
    layers = [layer for layer in layers_of(model) if layer.interventions(adapter_name)]
    numbers = {block: i for i, block in enumerate(find_blocks(model).modules)} if layers else {}
    for layer in layers:
        number, at_input = numbers.get(layer.get_base_layer()), layer.specs[adapter_name].at_input
        for edit in layer.interventions(adapter_name):
            kind = isinstance(edit, (BiasIntervention, LobireftIntervention))
            if not kind or number is None or at_input or number in found:
                at = f"the input of {layer.name}" if at_input else layer.name
                raise ValueError(f"the edit at {at} is no single vector that is added to a block's output")
            U, _, _, b, _ = edit.weights()
            act: Any = torch_fn(edit.act_fn) if edit.act is None else edit.act
            found[number] = (edit.scale * (act(b) @ U)).float().cpu()
    if not found:
        raise ValueError(f"adapter_name is {adapter_name!r}, which edits nothing in this model")
    return found


def save_gguf(path: str | os.PathLike, vectors: Mapping[int, Tensor], model_type: str) -> None:
    """Write control vectors: direction.N is added to the output of block N, counted from 0.

    llama.cpp has no place for block 0, and takes N from 1 on: ``ValueError`` for it, and for what is no vector (d,) of finite
    numbers. ``model_type`` is the model's ``config.model_type``, a hint to readers. ``ImportError`` without the package gguf.
    """
    if not vectors or min(vectors) < 1:
        raise ValueError(
            f"vectors are of the layers {sorted(vectors)}; a control vector has one layer at least, from 1 on"
        )
    rows = {layer: vectors[layer].detach().float().cpu().contiguous() for layer in sorted(vectors)}
    for layer, row in rows.items():
        if row.ndim != 1 or not bool(row.isfinite().all()):
            raise ValueError(
                f"vectors[{layer}] is {tuple(row.shape)}; it must be (d,), finite numbers of fp32 all of them"
            )
    gguf, path = _gguf(), Path(path)
    with staged(path.parent, last=path.name) as staging:
        writer = gguf.GGUFWriter(staging / path.name, ARCH)
        writer.add_string(f"{ARCH}.model_hint", model_type)
        writer.add_uint32(f"{ARCH}.layer_count", len(rows))
        for layer, row in rows.items():
            writer.add_tensor(f"direction.{layer}", row.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def load_gguf(
    path: str | os.PathLike, model: nn.Module, *, positions: str = "all", adapter_name: str = "default"
) -> PeftModel:
    """``model`` with the control vectors of a file as a ``bias`` adapter, at every token unless ``positions`` says otherwise,
    active beside the adapters that are.

    ``ValueError`` for a file that is none, or that is for another number of layers or another width, and for a name that is
    taken; the model is then as it was. ``ImportError`` without the package gguf.
    """
    return with_vectors(model, _read(path), positions, adapter_name)


def _read(path: str | os.PathLike) -> dict[int, Tensor]:
    gguf = _gguf()
    try:
        tensors = list(gguf.GGUFReader(path).tensors)
    except Exception as error:  # whatever it makes of a broken file
        raise ValueError(f"'{path}' is no GGUF file: {' '.join(str(error).split())}") from None
    found: dict[int, Tensor] = {}
    for tensor in tensors:
        match = re.fullmatch(r"direction\.(\d+)", tensor.name)
        if match is not None:
            found[int(match[1])] = torch.from_numpy(tensor.data.copy()).float()
    if not found:
        raise ValueError(f"'{path}' holds no control vector: no tensor in it is called direction.N")
    if not all(bool(vector.isfinite().all()) for vector in found.values()):
        raise ValueError(f"'{path}' holds values that are not finite numbers")
    return found
