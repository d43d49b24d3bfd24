"""The same LoReFT run in pyreft and in fastreft: time of a training step over the frozen floor, memory of the interventions.

    python benchmarks/bench_pyreft.py [--only llama|roberta] [--save]

The floor trains one bias vector at the output of layer 0. "ours" is the PEFT method, "drop-in" fastreft.pyreft in pyreft's
calling convention, "guest" our modules inside the real pyreft. Memory is the bytes of parameters and buffers of all
interventions, and what the process's resident memory grew by when they were made. pyreft and pyvene are needed
for theirs (pip install --no-deps pyreft==0.1.0 pyvene==0.1.8, see `make test-pyreft`); without them ours is measured alone.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from bench_train import Bias, llama, step_of, twin
from harness import measure, parser, save, table
from torch import nn
from transformers import PreTrainedModel, RobertaConfig, RobertaForMaskedLM

import fastreft
import fastreft.pyreft
from fastreft import ReftAdamW, ReftConfig, get_reft_model, param_groups
from fastreft.blocks import find_blocks

VOCAB, R, PREFIX, SUFFIX = 1000, 4, 5, 5
SHAPES = ((1, 16), (8, 128))


def roberta() -> PreTrainedModel:
    return RobertaForMaskedLM(
        RobertaConfig(vocab_size=VOCAB, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    )


MODELS: dict[str, tuple[str, Callable[[], PreTrainedModel]]] = {
    "llama": ("Llama 512 x 8 layers", lambda: llama(512, 8, 8)),
    "roberta": ("RoBERTa 768 x 12 layers", roberta),
}


def real_pyreft() -> Any:
    try:
        import pyreft
        import pyreft.interventions
    except ImportError:
        return None
    return pyreft


def resident() -> int:
    """Bytes of this process in memory; 0 where the system does not say."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096
    except OSError:
        return 0


def components_of(model: PreTrainedModel) -> list[str]:
    """Each block as pyreft names it for a model it does not know."""
    names = [name for name, _ in find_blocks(model)]
    return [f"{name.rpartition('.')[0]}[{name.rpartition('.')[2]}].output" for name in names]


def build(api: Any, modules: Any, base: PreTrainedModel) -> tuple[nn.Module, int]:
    """A model of pyreft's kind with LoReFT on every layer, and by how much the process grew for its interventions."""
    width = base.get_input_embeddings().weight.shape[1]
    gc.collect()
    before = resident()
    interventions = [
        modules.LoreftIntervention(embed_dim=width, low_rank_dimension=R, dtype=torch.float32)
        for _ in find_blocks(base)
    ]
    grown = resident() - before
    config = api.ReftConfig(
        representations=[
            {"layer": i, "component": component, "low_rank_dimension": R, "intervention": intervention}
            for i, (component, intervention) in enumerate(zip(components_of(base), interventions, strict=True))
        ]
    )
    return api.get_reft_model(base, config), grown


def located_step(model: Any, batch: dict[str, torch.Tensor], columns: list[int], optimizer: Any) -> Callable[[], None]:
    """A step in pyreft's calling convention, locations given as lists."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    where = {"sources->base": (None, [[columns] * len(batch["input_ids"])] * len(model.interventions))}

    def step() -> None:
        model(inputs, unit_locations=where, labels=batch["labels"])[1].loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    model.train()
    return step


def held(modules: Any) -> int:
    """Bytes of parameters and buffers."""
    tensors = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def case(name: str, shape: tuple[int, int], rounds: int) -> dict[str, object]:
    title, make = MODELS[name]
    batch_size, length = shape
    torch.manual_seed(0)
    base = make().requires_grad_(False)
    ids = torch.randint(5, VOCAB, shape)
    labels = ids.clone()
    prompt = length // 2 if name == "llama" else length
    if name == "llama":
        labels[:, :prompt] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    columns = [*range(PREFIX), *range(prompt - SUFFIX, prompt)] if prompt >= 2 * PREFIX else list(range(prompt))

    floor = twin(base)
    bias = Bias(base.get_input_embeddings().weight.shape[1])
    find_blocks(floor)[0][1].register_forward_hook(bias)
    ours = get_reft_model(twin(base), ReftConfig(r=R, positions=f"f{PREFIX}+l{SUFFIX}"))
    drop_in, grown = build(fastreft.pyreft, fastreft, twin(base))
    steps = {
        "floor": step_of(floor, torch.optim.AdamW(bias.parameters()), batch),
        "ours": step_of(ours, ReftAdamW(param_groups(ours, lr=1e-4)), batch),
        "drop-in": located_step(drop_in, batch, columns, ReftAdamW(param_groups(drop_in, lr=1e-4))),
    }
    memory = {"ours KiB": held(drop_in.interventions.values()) / 1024, "ours grew KiB": grown / 1024}
    real = real_pyreft()
    if real is not None:
        theirs, grown = build(real, real, twin(base))
        guest, _ = build(real, fastreft, twin(base))
        for kind, model in (("pyreft", theirs), ("guest", guest)):
            optimizer = torch.optim.AdamW(model.get_trainable_parameters(), lr=1e-4)
            steps[kind] = located_step(model, batch, columns, optimizer)
        memory |= {"pyreft KiB": held(theirs.interventions.values()) / 1024, "pyreft grew KiB": grown / 1024}
        memory["pyreft / ours"] = memory["pyreft KiB"] / memory["ours KiB"]
    times = measure(steps, rounds, budget_s=100)
    result: dict[str, object] = {"case": f"{title}, {batch_size} x {length}", "floor ms": times["floor"]}
    return result | {f"{kind}/floor": times[kind] / times["floor"] for kind in times if kind != "floor"} | memory


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--only", choices=tuple(MODELS))
    options = arguments.parse_args()
    names = [options.only] if options.only else list(MODELS)
    results = [case(name, shape, options.rounds) for name in names for shape in SHAPES]
    table("A training step, over the same step with one trainable bias at layer 0 (medians)", results)
    if options.save:
        save(__file__, results)


if __name__ == "__main__":
    main()
