"""The same LoReFT run in pyreft and in fastreft: time of a training step over the frozen floor, memory of the interventions.

    python benchmarks/bench_pyreft.py [--only llama|roberta] [--save]

The floor trains one bias vector at the output of layer 0. "ours" is the PEFT method, "drop-in" fastreft.pyreft in pyreft's
calling convention, "guest" our modules inside the real pyreft. All take steps of the same tiny length, so that every round
meets the same numbers, and freed memory is kept, so that no round pays for fresh pages. Memory is the bytes of parameters
and buffers of all interventions, and the peak resident memory of a process of its own that takes three steps, over the
floor's. Theirs needs pyreft and pyvene, see `make test-pyreft`; without them ours is measured alone. Leave the machine
alone meanwhile: a step has hundreds of parallel regions, and each waits for the slowest of its threads.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_train import Bias, llama, step_of, twin
from harness import keep_heap, measure, parser, save, table
from transformers import PreTrainedModel, RobertaConfig, RobertaForMaskedLM

import fastreft
import fastreft.pyreft
from fastreft import ReftAdamW, ReftConfig, get_reft_model, param_groups
from fastreft.pyreft.components import block_names, bracketed

VOCAB, R, PREFIX, SUFFIX, LR = 1000, 4, 5, 5, 1e-6
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


def components_of(model: PreTrainedModel) -> list[str]:
    """Each block as pyreft names it for a model it does not know."""
    return [f"{bracketed(name)}.output" for name in block_names(model)]


def build(api: Any, modules: Any, base: PreTrainedModel) -> Any:
    """A model of pyreft's kind with LoReFT on every layer."""
    width = base.get_input_embeddings().weight.shape[1]
    config = api.ReftConfig(
        representations=[
            {
                "layer": i,
                "component": component,
                "low_rank_dimension": R,
                "intervention": modules.LoreftIntervention(embed_dim=width, low_rank_dimension=R, dtype=torch.float32),
            }
            for i, component in enumerate(components_of(base))
        ]
    )
    return api.get_reft_model(base, config)


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


def bytes_of(modules: Any) -> int:
    """Bytes of parameters and buffers."""
    tensors = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def prepare(name: str, shape: tuple[int, int]) -> tuple[PreTrainedModel, dict[str, torch.Tensor], list[int]]:
    """(a frozen model, a batch, the columns to edit)."""
    torch.manual_seed(0)
    base = MODELS[name][1]().requires_grad_(False)
    ids = torch.randint(5, VOCAB, shape)
    labels = ids.clone()
    prompt = shape[1] // 2 if name == "llama" else shape[1]
    if name == "llama":
        labels[:, :prompt] = -100
    columns = sorted({*range(min(PREFIX, prompt // 2)), *range(prompt - min(SUFFIX, prompt // 2), prompt)})
    return base, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}, columns


def variant(kind: str, base: PreTrainedModel, batch: dict[str, torch.Tensor], columns: list[int]) -> tuple[Any, Any]:
    """(a training step of that kind, its model)."""
    model: Any = twin(base)
    if kind == "floor":
        bias = Bias(base.get_input_embeddings().weight.shape[1])
        model.get_submodule(block_names(model)[0]).register_forward_hook(bias)
        return step_of(model, torch.optim.AdamW(bias.parameters(), lr=LR), batch), model
    if kind == "ours":
        model = get_reft_model(model, ReftConfig(r=R, positions=f"f{PREFIX}+l{SUFFIX}"))
        return step_of(model, ReftAdamW(param_groups(model, lr=LR)), batch), model
    if kind == "drop-in":
        model = build(fastreft.pyreft, fastreft, model)
        return located_step(model, batch, columns, ReftAdamW(param_groups(model, lr=LR))), model
    real = real_pyreft()
    model = build(real, real if kind == "pyreft" else fastreft, model)
    optimizer = torch.optim.AdamW(model.get_trainable_parameters(), lr=LR)
    return located_step(model, batch, columns, optimizer), model


def peak_mib(name: str, shape: tuple[int, int], kind: str) -> float:
    """The peak resident memory of a process of its own that takes three steps."""
    child = [sys.executable, __file__, "--child", name, str(SHAPES.index(shape)), kind]
    done = subprocess.run(child, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1]) / 1024


def child(name: str, shape: str, kind: str) -> None:
    """Three steps, then the peak in KiB on stdout. Every kind imports pyreft, so that they differ in the run alone."""
    real_pyreft()
    step, _ = variant(kind, *prepare(name, SHAPES[int(shape)]))
    for _ in range(3):
        step()
    # Not getrusage: its maximum is inherited from the parent.
    print(
        next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")).split()[1]
    )


def case(name: str, shape: tuple[int, int], rounds: int) -> dict[str, object]:
    base, batch, columns = prepare(name, shape)
    kinds = ["floor", "ours", "drop-in"] + (["pyreft", "guest"] if real_pyreft() is not None else [])
    made = {kind: variant(kind, base, batch, columns) for kind in kinds}
    times = measure({kind: step for kind, (step, _) in made.items()}, rounds, budget_s=35)
    result: dict[str, object] = {"case": f"{MODELS[name][0]}, {shape[0]} x {shape[1]}", "floor ms": times["floor"]}
    result |= {f"{kind}/floor": times[kind] / times["floor"] for kind in kinds[1:]}
    held = {kind: bytes_of(made[kind][1].interventions.values()) for kind in kinds[2:]}
    result |= {f"{kind} KiB": size / 1024 for kind, size in held.items()}
    if "pyreft" in held:
        result["pyreft / ours"] = held["pyreft"] / held["drop-in"]
    peaks = {kind: peak_mib(name, shape, kind) for kind in kinds if kind in ("floor", "ours", "pyreft")}
    return result | {f"{kind} peak MiB over floor": peaks[kind] - peaks["floor"] for kind in peaks if kind != "floor"}


def main() -> None:
    if "--child" in sys.argv:
        child(*sys.argv[-3:])
        return
    arguments = parser(__doc__)
    arguments.add_argument("--only", choices=tuple(MODELS))
    options = arguments.parse_args()
    names = [options.only] if options.only else list(MODELS)
    keep_heap()
    results = []
    for name in names:
        for shape in SHAPES:
            results.append(case(name, shape, options.rounds))
            print(*(f"{key} {value}" for key, value in results[-1].items()), sep="\n  ", flush=True)
    table("A training step, over the same step with one trainable bias at layer 0 (medians)", results)
    if options.save:
        save(__file__, results)


if __name__ == "__main__":
    main()
