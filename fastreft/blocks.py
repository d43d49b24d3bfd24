"""Where a model keeps its blocks. Knows torch and Transformers' conventions, nothing of PEFT."""

from __future__ import annotations

from typing import Any

from torch import nn


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The repeated transformer blocks of a model, in order, as (name in the model, module).

    They are the longest ``nn.ModuleList`` whose members are blocks by Transformers' own word (``_no_split_modules``
    names their classes); else the longest whose members share a class, lists within a block (experts) left out.
    The first wins among equals, so an encoder-decoder gives its encoder. ``ValueError`` where there is none.
    """
    hints = set(getattr(model, "_no_split_modules", None) or ())
    lists = [
        (name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    ]
    hinted = [(name, module) for name, module in lists if all(type(block).__name__ in hints for block in module)]
    alike = [(name, module) for name, module in lists if len({type(block) for block in module}) == 1]
    outermost = [
        (name, module) for name, module in alike if not any(name.startswith(f"{other}.") for other, _ in alike)
    ]
    found = max(hinted or outermost, key=lambda item: len(item[1]), default=None)
    if found is None:
        raise ValueError(
            f"no repeated blocks found in {type(model).__name__}: it has no nn.ModuleList whose members share a class; "
            "name the modules to edit with target_modules"
        )
    return [(f"{found[0]}.{i}", block) for i, block in enumerate(found[1])]


def hidden_size(model: nn.Module) -> int:
    """The width d of the hidden state between blocks, from the model's config. ``ValueError`` where it does not say."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    for name in ("hidden_size", "n_embd", "d_model"):
        size = getattr(config, name, None)
        if isinstance(size, int):
            return size
    raise ValueError(
        f"the hidden size of {type(model).__name__} is unknown: its config has none of hidden_size, n_embd and d_model"
    )
