"""What ReFT costs when generating: a decoded token and a prefill, over the bare model's.

    python benchmarks/bench_generate.py [--save]

A decoded token is (generate of 129 tokens - generate of 65) / 64 for one prompt of 16 tokens, greedy: both read the prompt
after another model has run, so that this cancels. A prefill is a forward of 4 x 128 tokens, a first token generate's with
that prompt. LoReFT r = 4, f5+l5, on every layer of the embedded model and of a GPT-2 of random weights.
"""

from __future__ import annotations

import copy

import torch
from harness import keep_heap, measure, parser, save, table
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import fastreft
from fastreft.tasks.models import EMBEDDED_PATH

TOKENS = 64


def models() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "embedded Llama, 2M": AutoModelForCausalLM.from_pretrained(EMBEDDED_PATH, dtype=torch.float32),
        "GPT-2 768 x 12 layers": GPT2LMHeadModel(GPT2Config(vocab_size=1000, n_positions=256)),
    }


def writer(model: nn.Module, prompt: torch.Tensor, tokens: int):
    """generate, exactly so many tokens."""
    settings = {"do_sample": False, "min_new_tokens": tokens, "max_new_tokens": tokens, "pad_token_id": 0}
    mask = torch.ones_like(prompt)
    return lambda: model.generate(input_ids=prompt, attention_mask=mask, **settings)


def reader(model: nn.Module, ids: torch.Tensor):
    """A forward without gradients."""
    return torch.no_grad()(lambda: model(input_ids=ids, attention_mask=torch.ones_like(ids)))


def case(name: str, bare: nn.Module, rounds: int) -> dict[str, object]:
    bare = bare.eval()
    config = fastreft.ReftConfig(r=4, positions="f5+l5", task_type="CAUSAL_LM")
    edited = fastreft.get_reft_model(copy.deepcopy(bare, {id(p): p for p in bare.parameters()}), config).eval()
    prompt, ids = torch.randint(5, 900, (1, 16)), torch.randint(5, 900, (4, 128))
    runs = {}
    for kind, model in (("bare", bare), ("ReFT", edited)):
        runs[f"{kind} long"] = writer(model, prompt, 2 * TOKENS + 1)
        runs[f"{kind} short"] = writer(model, prompt, TOKENS + 1)
        runs[f"{kind} prefill"] = reader(model, ids)
        runs[f"{kind} first"] = writer(model, ids, 1)
    times = measure(runs, rounds, budget_s=240)
    token = {kind: (times[f"{kind} long"] - times[f"{kind} short"]) / TOKENS for kind in ("bare", "ReFT")}
    return {
        "model": name,
        "bare token ms": token["bare"],
        "ReFT/bare token": token["ReFT"] / token["bare"],
        "bare prefill ms": times["bare prefill"],
        "ReFT/bare prefill": times["ReFT prefill"] / times["bare prefill"],
        "bare first token ms": times["bare first"],
        "ReFT/bare first token": times["ReFT first"] / times["bare first"],
    }


def main() -> None:
    options = parser(__doc__).parse_args()
    keep_heap()
    results = [case(name, model, options.rounds) for name, model in models().items()]
    table("Generating with LoReFT attached (medians)", results)
    if options.save:
        save(__file__, results)


if __name__ == "__main__":
    main()
