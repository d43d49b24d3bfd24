"""What LoReFT costs whole models on a GPU: a training step, a prompt and a written token, over those of the bare model.

    python benchmarks/gpu_models.py [--only 7B|1B] [--save]

Models have the shapes of Llama 2 7B and Llama 3.2 1B, random weights, bfloat16. The floor of a training step has one
trainable bias at the output of layer 0, so that the backward goes through the whole frozen model; all variants share the
frozen weights. LoReFT r = 8 on every layer, at f7+l7 (the paper's, section 4) and at all tokens; PEFT's LoRA r = 8.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import peft
import torch
from bench_generate import reader, writer
from bench_train import Bias, step_of, twin
from harness import measure, parser, save, table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fastreft import ReftAdamW, ReftConfig, get_reft_model, param_groups
from fastreft.models.blocks import find_blocks

# vocabulary, width, of the MLP, layers, heads, of keys; batch and tokens of a step
SHAPES = {"7B": ((32000, 4096, 11008, 32, 32, 32), (8, 512)), "1B": ((128256, 2048, 8192, 16, 32, 8), (8, 512))}
TOKENS = 32


def bare_model(shape: tuple[int, ...]) -> LlamaForCausalLM:
    vocabulary, width, inner, layers, heads, keys = shape
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        dtype="bfloat16",
    )
    with torch.device("cuda"):
        return LlamaForCausalLM(config).to(torch.bfloat16).requires_grad_(False)


def adapted(base: nn.Module) -> dict[str, nn.Module]:
    lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    pairs = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    configs = {
        "LoReFT f7+l7": ReftConfig(r=8, positions="f7+l7", task_type="CAUSAL_LM"),
        "LoReFT all": ReftConfig(r=8, positions="all", task_type="CAUSAL_LM"),
    }
    made = {name: get_reft_model(twin(base), config) for name, config in configs.items()}
    return made | {
        "LoRA q, v": peft.get_peft_model(twin(base), pairs),
        "LoRA all-linear": peft.get_peft_model(twin(base), lora),
    }


def trained(base: nn.Module, models: dict[str, nn.Module], size: tuple[int, int], rounds: int) -> dict[str, object]:
    ids = torch.randint(1000, size, device="cuda")
    labels = ids.clone()
    labels[:, : size[1] // 2] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "use_cache": False}
    floor = twin(base)
    bias = Bias(base.config.hidden_size).to("cuda", torch.bfloat16)
    find_blocks(floor).modules[0].register_forward_hook(bias)
    steps = {"floor": step_of(floor, torch.optim.AdamW(bias.parameters()), batch)}
    for name, model in models.items():
        reft = name.startswith("LoReFT")
        theirs = [p for p in model.parameters() if p.requires_grad]
        steps[name] = step_of(
            model, ReftAdamW(param_groups(model, lr=1e-4)) if reft else torch.optim.AdamW(theirs), batch
        )
    peaks = {}
    for name, step in steps.items():
        torch.cuda.reset_peak_memory_stats()
        step()
        peaks[name] = torch.cuda.max_memory_allocated() / 2**30
    times = measure(steps, rounds, budget_s=30)
    return {
        "ms": times["floor"],
        **{name: times[name] / times["floor"] for name in models},
        "peak GiB": peaks["floor"],
        **{f"GiB, {name}": peaks[name] - peaks["floor"] for name in models},
    }


def written(models: dict[str, nn.Module], size: tuple[int, int], rounds: int) -> list[dict[str, object]]:
    prompt = torch.randint(1000, size, device="cuda")
    between: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        model.eval()
    runs: dict[str, Callable[[], object]] = {name: reader(model, prompt) for name, model in models.items()}
    prefill = measure(runs, rounds, budget_s=10)
    measure(
        {name: writer(model, prompt, TOKENS + 1, between[name]) for name, model in models.items()}, 3, 1, budget_s=6
    )
    token = {name: median(each) for name, each in between.items()}
    return [
        {"what": what, "ms": ms["bare"], **{name: ms[name] / ms["bare"] for name in models if name != "bare"}}
        for what, ms in ((f"a prompt of {size[0]} x {size[1]}", prefill), (f"then a token of each of {size[0]}", token))
    ]


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--only", choices=tuple(SHAPES))
    options = arguments.parse_args()
    results = {}
    for name in [options.only] if options.only else SHAPES:
        torch.manual_seed(0)
        shape, size = SHAPES[name]
        base = bare_model(shape)
        models = adapted(base)
        step = trained(base, models, size, options.rounds)
        table(f"{name}: a training step of {size[0]} x {size[1]} tokens, over the floor's", [step])
        lines = written({"bare": base, **models}, (16, 128), options.rounds)
        table(f"{name}: generating, over the bare model's (medians)", lines)
        results[name] = {"step": step, "generating": lines}
        if options.save:  # after each model: what comes next may run out of time
            save(__file__, results)
        del base, models
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
