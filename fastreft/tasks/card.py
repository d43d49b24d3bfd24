"""The model card of what was trained: what it is, of what model, by which settings, and how it is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from ..files import OURS

# Of a run's log, what the card says; the rest is in training.json.
_SAID = ("task", "steps", "train_records", "learning_rate", "trained_numbers", "dtype")
_AUTO = {
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
}
_USE = """```python
import fastreft  # registers the method with PEFT
from peft import {auto}

model = {auto}.from_pretrained("this folder")
```
"""


def card(base: str, method: str, settings: dict[str, Any], log: dict[str, Any], task_type: str | None) -> str:
    """Markdown. ``base``: the model's name; of a folder the last part alone, as the rest says nothing elsewhere.
    ``task_type``: PEFT's name of what an adapter does; None of a model that was trained whole."""
    named = base if not Path(base).expanduser().exists() else None
    said = {**{name: log[name] for name in _SAID if log.get(name) is not None}, **settings}
    data = ModelCardData(base_model=named, library_name="peft", tags=["fastreft", method])
    rows = "\n".join(f"| {name} | {value} |" for name, value in said.items() if not isinstance(value, (dict, list)))
    use = "" if task_type is None else _USE.format(auto=_AUTO[task_type])
    return (
        f"---\n{data.to_yaml()}\n---\n{OURS}\n\n# {method} of {named or Path(base).name}\n\n"
        "Trained by `fastreft train`; `training.json` has every setting, the losses and the scores.\n\n"
        f"| | |\n|---|---|\n{rows}\n\n{use}"
    )
