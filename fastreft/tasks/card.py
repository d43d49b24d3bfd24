"""The model card of what was trained: what it is, of what model, by which settings, and how it is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from ..files import OURS

# Of a run's log, what the card says; the rest is in training.json.
_SAID = ("task", "steps", "train_records", "learning_rate", "trained_numbers", "dtype")
_USE = """```python
import fastreft  # registers the method with PEFT
from peft import {auto}

model = {auto}.from_pretrained("this folder")
```
"""


def card(base: str, method: str, settings: dict[str, Any], log: dict[str, Any]) -> str:
    """Markdown. ``base``: the model's name; of a folder the last part alone, as the rest says nothing elsewhere."""
    named = base if not Path(base).expanduser().exists() else None
    said = {**{name: log[name] for name in _SAID if log.get(name) is not None}, **settings}
    data = ModelCardData(base_model=named, library_name="peft", tags=["fastreft", method])
    auto = {"classify": "AutoPeftModelForSequenceClassification", "tag": "AutoPeftModelForTokenClassification"}
    rows = "\n".join(f"| {name} | {value} |" for name, value in said.items() if not isinstance(value, (dict, list)))
    use = _USE.format(auto=auto.get(str(log.get("kind")), "AutoPeftModelForCausalLM"))
    return (
        f"---\n{data.to_yaml()}\n---\n{OURS}\n\n# {method} of {named or Path(base).name}\n\n"
        "Trained by `fastreft train`; `training.json` has every setting, the losses and the scores.\n\n"
        f"| | |\n|---|---|\n{rows}\n\n{use if settings else ''}"
    )
