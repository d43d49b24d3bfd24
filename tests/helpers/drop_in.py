"""pyreft's models over our edits, their locations, and folders of pyreft's to read."""

from __future__ import annotations

import torch
from tiny import LAYERS, WIDTH, make
from transformers import TrainingArguments

from fastreft import pyreft
from fastreft.interventions import INTERVENTIONS
from fastreft.pyreft import checkpoint
from fastreft.pyreft.checkpoint import Entry

R = 3


def config_of(places=None, kind="Loreft", **settings):
    """A configuration with an intervention at each (layer, component)."""
    torch.manual_seed(5)
    made = getattr(pyreft, f"{kind}Intervention")
    places = places or [(layer, "block_output") for layer in range(LAYERS)]
    return pyreft.ReftConfig(
        representations=[
            {
                "layer": layer,
                "component": component,
                "low_rank_dimension": R,
                "intervention": made(embed_dim=WIDTH, low_rank_dimension=R, **settings),
            }
            for layer, component in places
        ]
    )


def model_of(places=None, base=None, **settings):
    return pyreft.get_reft_model(base or make("llama"), config_of(places, **settings))


def at(columns, interventions=LAYERS, samples=3):
    return {"sources->base": (None, [[columns] * samples] * interventions)}


def arguments(folder, **settings):
    defaults = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 5e-3,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "no",
    }
    return TrainingArguments(output_dir=str(folder), **(defaults | settings))


def interventions(kind, count, d=WIDTH, **settings):
    torch.manual_seed(7)
    return [INTERVENTIONS[kind](embed_dim=d, low_rank_dimension=R, **settings) for _ in range(count)]


def write(folder, kind="loreft", places=None, **settings):
    """A checkpoint with an intervention at each (layer, component), and the interventions."""
    places = places or [(layer, "block_output") for layer in range(LAYERS)]
    made = interventions(kind, len(places), **settings)
    checkpoint.write(folder, [Entry(*place, m) for place, m in zip(places, made, strict=True)])
    return made


def as_trainers(folder):
    """A trainer's checkpoint: no config.json, a file for the base model's weights, one folder further in."""
    inner = folder / "intervenable_model"
    inner.mkdir()
    for file in folder.glob("intkey_*"):
        file.rename(inner / file.name)
    (folder / "config.json").unlink()
    torch.save({}, inner / "pytorch_model.bin")
