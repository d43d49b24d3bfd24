"""Adapters on disk, whole and damaged in every way, and what a load must leave as it was."""

import json
import pickle
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny import hooks_on, make

from fastreft import ReftConfig, get_reft_model

WEIGHTS = "adapter_model.safetensors"


def adapted(kind="llama", seed=2, **settings):
    torch.manual_seed(seed)
    return get_reft_model(make(kind), ReftConfig(**{"r": 3, "positions": "f2+l3", **settings}))


def rewritten(change):
    """A way to change an adapter's tensors."""

    def run(folder):
        tensors = load_file(folder / WEIGHTS)
        save_file(change(tensors) or tensors, folder / WEIGHTS)

    return run


def first(tensors, name):
    return next(key for key in tensors if key.endswith(name))


def put(name, make):
    def change(tensors):
        key = first(tensors, name)
        tensors[key] = make(tensors[key])

    return rewritten(change)


def cut(folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def evil(folder):
    class Evil:
        def __reduce__(self):
            return (Path(folder, "ran").write_text, ("x",))

    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Evil()))


def config(**settings):
    def run(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))

    return run


DAMAGES = {
    "truncated": cut,
    "garbage": lambda folder: (folder / WEIGHTS).write_bytes(b"garbage" * 99),
    "empty": lambda folder: (folder / WEIGHTS).write_bytes(b""),
    "missing": lambda folder: (folder / WEIGHTS).unlink(),
    "evil": evil,
    "NaN": put("W", lambda t: t.fill_(float("nan"))),
    "infinity": put("b", lambda t: t.fill_(float("inf"))),
    "R zero": put("R", lambda t: t * 0),
    "R scaled": put("R", lambda t: t * 2),
    "R random": put("R", torch.randn_like),
    "equal rows": put("R", lambda t: t[:1].expand_as(t).contiguous()),
    "integers": put("W", lambda t: t.int()),
    "bool": put("b", lambda t: t > 0),
    "complex": put("W", lambda t: t.to(torch.complex64)),
    "float8": put("W", lambda t: t.to(torch.float8_e4m3fn)),
    "another shape": put("W", lambda t: t[:, :5].contiguous()),
    "a key less": rewritten(lambda t: {key: value for key, value in t.items() if key != first(t, "W")}),
    "a key more": rewritten(
        lambda t: t.update({"base_model.model.model.layers.9.reft.reft_edit.W": torch.ones(3, 32)})
    ),
    "the base's weights": rewritten(lambda t: t.update({"base_model.model.model.norm.weight": torch.zeros(32)})),
    "the base's embeddings": rewritten(
        lambda t: t.update({"base_model.model.model.embed_tokens.weight": torch.ones(61, 32)})
    ),
    "the base's head": rewritten(lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(61, 32)})),
    "LoRA's weights": rewritten(
        lambda t: t.update({"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(2, 32)})
    ),
    "a head that is trained by none": rewritten(
        lambda t: t.update({"base_model.model.lm_head.modules_to_save.weight": torch.ones(61, 32)})
    ),
    "another rank": config(r=2),
    "a rank too large": config(r=99),
    "no such layer": config(layers_to_transform=[77]),
    "modules without weights": config(modules_to_save=["lm_head"]),
}


def state_of(base):
    """All that a load may change of a model."""
    return (
        {name: p.clone() for name, p in base.state_dict().items()},
        [name for name, _ in base.named_modules()],
        {name: p.requires_grad for name, p in base.named_parameters()},
        hooks_on(base),
        {name for name in base.__dict__ if name != "_is_hf_initialized"},
        list(getattr(base, "peft_config", {})),
    )


def unchanged(base, before):
    after = state_of(base)
    assert before[0].keys() == after[0].keys() and all(torch.equal(before[0][k], after[0][k]) for k in after[0])
    assert before[1:] == after[1:]
