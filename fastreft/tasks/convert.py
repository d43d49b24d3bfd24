"""``fastreft convert``: a pyreft checkpoint or a control vector to an adapter of ours, or an adapter of ours to either."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from fastreft import pyreft

from ..concepts import load_gguf, save_gguf, vectors_of
from .errors import UserError, user_errors
from .flags.convert import GGUF, ConvertArguments
from .models import BROKEN, adapter_keys, own_code, reft_config, save_adapter
from .places import ADAPTER_CONFIG, find_model


def skeleton(model: str) -> Any:
    """The base model without its weights, of the class that its config.json names."""
    source, keywords = find_model(model)
    named_code, code = own_code(model, False)  # of which the class that config.json names needs none
    with user_errors(*BROKEN, prefix=f"cannot read the configuration of '{model}': "), named_code:
        config = AutoConfig.from_pretrained(source, **keywords, **code)
        named = getattr(transformers, (config.architectures or [""])[0], None)
        with torch.device("meta"):
            made = named(config) if named is not None else AutoModelForCausalLM.from_config(config)
    made.name_or_path = model
    return made


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UserError(f"'{name}' is not a dtype; give 'float32', 'bfloat16' or 'float16'")
    return found


def from_pyreft(arguments: ConvertArguments) -> str:
    """Write an adapter of ours; a line about it."""
    if arguments.model is None:
        raise UserError("give the base model with --model: a pyreft checkpoint does not name it")
    dtype, base = _dtype(arguments.dtype), skeleton(arguments.model)
    with user_errors(*BROKEN), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        model = pyreft.load(
            arguments.source,
            base,
            positions=arguments.positions,
            act_fn=arguments.act_fn,
            dropout=arguments.dropout,
            dtype=dtype,
            intervention_type=arguments.intervention_type,
            orthonormalise=arguments.orthonormalise,
        )
    notes = [f"note: {w.message}\n" for w in said if any(word in str(w.message) for word in ("orthonormal", "trained"))]
    config: Any = model.peft_config["default"]
    config.base_model_name_or_path = find_model(arguments.model)[0]
    save_adapter(model, None, arguments.model, arguments.output_dir)
    given = "" if arguments.positions else " (the default; pyreft's files do not say: --positions)"
    return (
        f"{''.join(notes)}{config.intervention_type} of rank {config.r}, positions {config.positions}{given}, "
        f"act_fn {config.act_fn or 'linear'}"
    )


def from_gguf(arguments: ConvertArguments) -> str:
    """Write an adapter of ours of a file of control vectors; a line about it."""
    if arguments.model is None:
        raise UserError("give the base model with --model: a control vector does not name it")
    positions = arguments.positions or "all"
    with user_errors(ValueError, ImportError):
        model = load_gguf(Path(arguments.source).expanduser(), skeleton(arguments.model), positions=positions)
    config: Any = model.peft_config["default"]
    config.base_model_name_or_path = find_model(arguments.model)[0]
    save_adapter(model, None, arguments.model, arguments.output_dir)
    return f"a vector at each of {len(config.layers_to_transform)} layers, positions {positions}"


def to_gguf(arguments: ConvertArguments) -> str:
    """Write control vectors; a line about them."""
    config, base = reft_config(arguments.source), skeleton(_base_of(arguments))
    with user_errors(*BROKEN, ImportError, prefix=f"the adapter in '{arguments.source}' is no control vector: "):
        model = PeftModel.from_pretrained(base, str(Path(arguments.source).expanduser()), torch_device="cpu")
        vectors = vectors_of(model)
        save_gguf(Path(arguments.output_dir).expanduser(), vectors, base.config.model_type)
    return (
        f"a vector at each of {len(vectors)} layers; a control vector has no place for positions ({config.positions})"
    )


def _base_of(arguments: ConvertArguments) -> str:
    name = arguments.model or reft_config(arguments.source).base_model_name_or_path
    if name is None:
        raise UserError("give the base model with --model: the adapter does not name it")
    return str(name)


def to_pyreft(arguments: ConvertArguments) -> str:
    """Write a pyreft checkpoint; a line about it."""
    config, name = reft_config(arguments.source), _base_of(arguments)
    strange = sorted(key for key in adapter_keys(arguments.source) if ".reft.reft_" not in key)
    if strange:
        raise UserError(
            f"the adapter in '{arguments.source}' holds more than edits, see {strange[0]} (modules_to_save, or words that the "
            "base lacks), for which pyreft's files have no place"
        )
    base = skeleton(name)
    with user_errors(*BROKEN, prefix=f"the adapter in '{arguments.source}' does not fit '{name}': "):
        model = PeftModel.from_pretrained(base, str(Path(arguments.source).expanduser()), torch_device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the line below says the same of act_fn
        pyreft.save(model, arguments.output_dir)
    return (
        f"{config.intervention_type} of rank {config.r}; pyreft's files have no place for its positions ({config.positions}) "
        f"and act_fn ({config.act_fn or 'linear'})"
    )


def run(arguments: ConvertArguments) -> int:
    """Convert in the direction that the source and the name of the target tell."""
    back = (Path(arguments.source).expanduser() / ADAPTER_CONFIG).is_file()
    if arguments.source.endswith(GGUF):
        convert = from_gguf
    elif arguments.output_dir.endswith(GGUF):
        convert = to_gguf
    else:
        convert = to_pyreft if back else from_pyreft
    line = convert(arguments)
    print(f"{line}\nwrote {arguments.output_dir}")
    return 0
