"""Loading base models, tokenizers and adapters, with one sentence for whatever the user got wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from fastreft.files import staged

from ..settings import ReftSettings
from ..tuner.model import quiet_peft
from .card import card
from .errors import UserError, user_errors
from .places import ADAPTER_CONFIG, ADAPTER_WEIGHTS, EMBEDDED, MODEL_CONFIG, find_adapter, find_model
from .run_log import put_log
from .sets.registry import GENERATE, REGRESS, TAG

# What Transformers raises for files that are not what they should be.
BROKEN = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    IndexError,
    RuntimeError,
    SafetensorError,
    RecursionError,
)


def own_code(model: str, trust_remote_code: bool) -> Any:
    """Python out of a model's folder is run where it was asked for, and never out of an adapter's."""

    @contextmanager
    def named() -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            if "trust_remote_code" not in str(error):
                raise
            raise UserError(f"'{model}' brings Python code of its own, which --trust_remote_code runs") from error

    return named(), {"trust_remote_code": trust_remote_code}


def load_tokenizer(
    model: str, adapter: str | None = None, trust_remote_code: bool = False, *, writes: bool = True
) -> Any:
    """The tokenizer saved with the adapter, else the model's; pads on the right, with </s> if it has no <pad>. ``writes``: it
    ends completions, and so has to have an end of sequence."""
    if adapter and (Path(adapter).expanduser() / "tokenizer_config.json").is_file():
        source, keywords = str(Path(adapter).expanduser()), {"local_files_only": True}
        named, code = own_code(adapter, False)
    else:
        source, keywords = find_model(model)
        named, code = own_code(model, trust_remote_code)
    with user_errors(*BROKEN, prefix=f"cannot load the tokenizer of '{model}': "), named:
        tokenizer = AutoTokenizer.from_pretrained(source, **keywords, **code)
    if writes and tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of '{model}' has no end-of-sequence token, which ends every completion")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def dtype_of(model: str, dtype: str, *, on_gpu: bool) -> str:
    """The dtype that a name means; "auto" is the checkpoint's own, but fp32 on a processor that has no bf16 and for the
    embedded model, which is kept in bf16 to be small: a processor computes in fp32 many times faster then."""
    if dtype != "auto":
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise UserError(f"'{dtype}' is not a dtype; give 'auto', 'float32', 'bfloat16' or 'float16'")
        return dtype
    if model == EMBEDDED or not (on_gpu or _processor_has_bf16()):
        return "float32"
    return dtype


def _processor_has_bf16() -> bool:
    """Whether torch's own question says so; no where torch has another name for it."""
    return any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


def load_base(
    model: str,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    *,
    kind: Any = None,
    use_cpu: bool = False,
    **more: Any,
) -> Any:
    """The model, on the CPU. ``kind``: a class of Transformers' ``AutoModel...``, the causal language model's if not given;
    ``more`` goes to its ``from_pretrained``. ``dtype``: see :func:`dtype_of`."""
    source, keywords = find_model(model)
    dtype = dtype_of(model, dtype, on_gpu=torch.cuda.is_available() and not use_cpu)
    named, code = own_code(model, trust_remote_code)
    with user_errors(*BROKEN, prefix=f"cannot load the model '{model}': "), named:
        return (kind or AutoModelForCausalLM).from_pretrained(source, dtype=dtype, **keywords, **code, **more)


def load_config(model: str, trust_remote_code: bool = False) -> Any:
    """The model's configuration."""
    source, keywords = find_model(model)
    named, code = own_code(model, trust_remote_code)
    with user_errors(*BROKEN, prefix=f"cannot load the model '{model}': "), named:
        return AutoConfig.from_pretrained(source, **keywords, **code)


def context_of(config: Any) -> int | None:
    """The tokens that a model can take, those that it writes included; None where its configuration names no number."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def longest(max_length: int | None, config: Any) -> int:
    """The tokens that a record may have: what the user asked for, within what the model can take."""
    context = context_of(config)
    if max_length is None:
        return min(512, context or 512)
    if max_length < 2:
        raise UserError(f"max_length is {max_length}; a prompt and a completion need at least 2 tokens")
    if context and max_length > context:
        raise UserError(f"max_length is {max_length}, but the model's context is {context} tokens")
    return max_length


def class_for(kind: str, config: Any) -> tuple[Any, str]:
    """(the class of Transformers' that a task of this kind takes, PEFT's name of the kind)."""
    if kind == TAG:
        return AutoModelForTokenClassification, "TOKEN_CLS"
    if kind != GENERATE:
        return AutoModelForSequenceClassification, "SEQ_CLS"
    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM, "SEQ_2_SEQ_LM"
    return AutoModelForCausalLM, "CAUSAL_LM"


def head_settings(kind: str, labels: tuple[str, ...], tokenizer: Any) -> dict[str, Any]:
    """What a classifier's ``from_pretrained`` is told; nothing of a model that writes."""
    if kind == GENERATE:
        return {}
    named: dict[str, Any] = {}
    if labels:
        named = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    if kind != TAG:  # of whose head Transformers asks no problem
        named["problem_type"] = "regression" if kind == REGRESS else "single_label_classification"
    sizes = {} if labels else {"num_labels": 1}
    return {**named, **sizes, "pad_token_id": tokenizer.pad_token_id}


def adapter_config(adapter: str) -> PeftConfig:
    """The configuration in an adapter's folder."""
    path = find_adapter(adapter)
    with user_errors(*BROKEN, prefix=f"'{adapter}/{ADAPTER_CONFIG}' is not an adapter's: "):
        return PeftConfig.from_pretrained(str(path))


def reft_config(adapter: str) -> Any:
    """The configuration of an adapter of ours."""
    config = adapter_config(adapter)
    if not isinstance(config, ReftSettings):
        raise UserError(f"the adapter in '{adapter}' is not a ReFT adapter")
    return config


def adapter_keys(adapter: str) -> set[str]:
    """The names of the tensors in an adapter's folder."""
    path = Path(adapter).expanduser() / ADAPTER_WEIGHTS
    with (
        user_errors(OSError, SafetensorError, prefix=f"cannot read the adapter in '{adapter}': "),
        safe_open(path, framework="pt") as file,
    ):
        return set(file.keys())


def load_adapter(base: Any, adapter: str) -> PeftModel:
    """``base`` with the adapter of a folder, in eval mode; an adapter made for another model is an error."""
    path = Path(adapter).expanduser()
    misfit = f"the adapter in '{adapter}' does not fit the model '{base.name_or_path}': "
    saved = adapter_keys(adapter)
    with user_errors(*BROKEN, prefix=misfit), quiet_peft():
        model = PeftModel.from_pretrained(base, str(path))
    # PEFT only warns of weights that the model lacks or the file lacks; the text would be silently wrong.
    differing = saved ^ set(get_peft_model_state_dict(model, save_embedding_layers=False))
    if differing:
        raise UserError(f"{misfit}{len(differing)} weights are not in both, such as '{min(differing)}'")
    return model.eval()


_ON_CARD = ("r", "positions", "tied", "component", "layers_to_transform", "act_fn", "dropout", "lora_alpha")


def save_adapter(
    model: Any,
    tokenizer: Any,
    base: str,
    output_dir: str,
    log: dict[str, Any] | None = None,
    weights: dict[str, Any] | None = None,
) -> None:
    """Adapter, tokenizer and the log of its training, if any, into ``output_dir``, each file whole or not at all, the adapter's
    configuration last; of a model without an adapter, all of it. ``weights``: the model's, where it holds a shard of them."""
    last = ADAPTER_CONFIG if isinstance(model, PeftModel) else MODEL_CONFIG
    if (
        base == EMBEDDED and last == ADAPTER_CONFIG
    ):  # a name that holds on every machine, where the package's folder does not
        model.peft_config[model.active_adapter].base_model_name_or_path = EMBEDDED
    with staged(output_dir, last=last) as staging:
        more = {"save_embedding_layers": False} if last == ADAPTER_CONFIG else {}
        model.save_pretrained(staging, state_dict=weights, **more)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        if log is not None:
            put_log(staging, log)
            named, settings, task_type = str(log["method"]), {}, None
            if isinstance(model, PeftModel):
                config = model.peft_config[model.active_adapter]
                task_type = str(getattr(config.task_type, "value", config.task_type))
                named = config.intervention_type if isinstance(config, ReftSettings) else named
                settings = {name: getattr(config, name) for name in _ON_CARD if getattr(config, name, None) is not None}
            (staging / "README.md").write_text(card(base, named, settings, log, task_type), encoding="utf-8")
