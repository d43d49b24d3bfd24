"""Loading base models, tokenizers and adapters, with one sentence for whatever the user got wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastreft.files import staged

from .errors import UserError, user_errors
from .places import ADAPTER_CONFIG, ADAPTER_WEIGHTS, EMBEDDED, find_adapter, find_model


def load_tokenizer(model: str, adapter: str | None = None) -> Any:
    """The tokenizer saved with the adapter, else the model's; pads on the right, with </s> if it has no <pad>."""
    if adapter and (Path(adapter).expanduser() / "tokenizer_config.json").is_file():
        source, keywords = str(Path(adapter).expanduser()), {"local_files_only": True}
    else:
        source, keywords = find_model(model)
    with user_errors(OSError, ValueError, prefix=f"cannot load the tokenizer of '{model}': "):
        tokenizer = AutoTokenizer.from_pretrained(source, **keywords)
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of '{model}' has no end-of-sequence token, which ends every completion")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def load_base(model: str, dtype: str = "auto") -> Any:
    """The causal language model, on the CPU; ``dtype`` is a name of torch's, or "auto" for the checkpoint's own.

    The embedded model is kept in bf16 to be small, and "auto" runs it in fp32, which a CPU does faster.
    """
    source, keywords = find_model(model)
    if model == EMBEDDED and dtype == "auto":
        dtype = "float32"
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise UserError(f"'{dtype}' is not a dtype; give 'auto', 'float32', 'bfloat16' or 'float16'")
    with user_errors(OSError, ValueError, SafetensorError, prefix=f"cannot load the model '{model}': "):
        return AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **keywords)


def adapter_config(adapter: str) -> PeftConfig:
    """The configuration in an adapter's folder."""
    path = find_adapter(adapter)
    with user_errors(ValueError, TypeError, KeyError, prefix=f"'{adapter}/{ADAPTER_CONFIG}' is not an adapter's: "):
        return PeftConfig.from_pretrained(str(path))


def load_adapter(base: Any, adapter: str) -> PeftModel:
    """``base`` with the adapter of a folder, in eval mode; an adapter made for another model is an error."""
    path = Path(adapter).expanduser()
    misfit = f"the adapter in '{adapter}' does not fit the model '{base.name_or_path}': "
    unreadable = f"cannot read the adapter in '{adapter}': "
    with (
        user_errors(OSError, SafetensorError, prefix=unreadable),
        safe_open(path / ADAPTER_WEIGHTS, framework="pt") as file,
    ):
        saved = set(file.keys())
    with user_errors(ValueError, RuntimeError, prefix=misfit):
        model = PeftModel.from_pretrained(base, str(path))
    # PEFT only warns of weights that the model lacks or the file lacks; the text would be silently wrong.
    differing = saved ^ set(get_peft_model_state_dict(model, save_embedding_layers=False))
    if differing:
        raise UserError(f"{misfit}{len(differing)} weights are not in both, such as '{min(differing)}'")
    return model.eval()


def save_adapter(model: Any, tokenizer: Any, base: str, output_dir: str) -> None:
    """Adapter and tokenizer, if any, into ``output_dir``, each file whole or not at all, the adapter's configuration last."""
    if base == EMBEDDED:  # a name that holds on every machine, where the package's folder does not
        model.peft_config[model.active_adapter].base_model_name_or_path = EMBEDDED
    with staged(output_dir, last=ADAPTER_CONFIG) as staging:
        model.save_pretrained(staging, save_embedding_layers=False)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
