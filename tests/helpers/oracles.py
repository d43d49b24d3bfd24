"""pyreft's own outputs, as files beside the checkout: models, their adapters and what came out of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from common import SHARED
from torch import Tensor
from transformers.utils import logging

MODELS, INTERVENTIONS = SHARED / "oracles" / "models", SHARED / "oracles" / "interventions"
KINDS = ("llama", "roberta")
VARIANTS = ("shared", "split", "dup")

logging.set_verbosity_error()


def read(path: Path) -> Any:
    """A trusted file of the oracles; the test is skipped where they are absent."""
    if not path.exists():
        pytest.skip("no ../shared/oracles beside this checkout")
    return torch.load(path, weights_only=False)


def base_model(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """The oracle's base model, in eval mode."""
    state = read(MODELS / kind / "base_state_dict.pt")
    settings = json.loads((MODELS / kind / "config.json").read_text())
    of = transformers.LlamaForCausalLM if kind == "llama" else transformers.RobertaForMaskedLM
    model = of(of.config_class.from_dict(settings))
    model.load_state_dict(state)
    return model.to(dtype).eval()


def io(kind: str) -> dict[str, Any]:
    """Inputs, labels and, by variant and dtype, locations and results."""
    return read(MODELS / kind / "io.pt")


def inputs(data: dict[str, Any]) -> dict[str, Tensor]:
    return {"input_ids": data["input_ids"], "attention_mask": data["attention_mask"]}


def folder(kind: str, variant: str) -> Path:
    """The adapter as pyreft saved it."""
    return MODELS / kind / f"reft_{variant}"


def columns(case: dict[str, Any], variant: str) -> Tensor:
    """A case's locations as ``reft_positions``: (B, n), and (2, B, n) where prefix and suffix are apart."""
    located = torch.tensor(case["unit_locations"])
    return located[0] if variant == "shared" else torch.stack([located[0], located[-1]])


def shown(logits: Tensor, data: dict[str, Any]) -> Tensor:
    """The logits at real tokens."""
    return logits[data["attention_mask"].bool()]
