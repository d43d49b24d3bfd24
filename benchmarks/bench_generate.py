"""What ReFT costs when generating: a decoded token and a prefill, over the bare model's.

    python benchmarks/bench_generate.py [--save]

A decoded token is the median time between two of the last 64 tokens that generate writes of 65, greedy, after one prompt of
16: what comes before them, the prompt read after another model has run, is not in it. A prefill is a forward of 4 x 128
tokens, a first token generate's with that prompt. LoReFT r = 4, f5+l5, on every layer of the embedded model and of a GPT-2 of
random weights.
"""

from __future__ import annotations

import copy
import time
from statistics import median

import torch
from harness import keep_heap, measure, parser, save, table
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, StoppingCriteria, StoppingCriteriaList

import fastreft
from fastreft.tasks.places import EMBEDDED_PATH

TOKENS = 64


def models() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "embedded Llama, 2M": AutoModelForCausalLM.from_pretrained(EMBEDDED_PATH, dtype=torch.float32),
        "GPT-2 768 x 12 layers": GPT2LMHeadModel(GPT2Config(vocab_size=1000, n_positions=256)),
    }


class Clock(StoppingCriteria):
    """Notes when each token is there, and stops nothing."""

    def __init__(self) -> None:
        self.last = 0.0
        self.between: list[float] = []  # ms

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        if ids.is_cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.between.append(1e3 * (now - self.last))
        self.last = now
        return done


def writer(model: nn.Module, prompt: torch.Tensor, tokens: int, between: list[float] | None = None):
    """generate, exactly so many tokens; the times between them go to ``between``."""
    settings = {"do_sample": False, "min_new_tokens": tokens, "max_new_tokens": tokens, "pad_token_id": 0}
    mask = torch.ones_like(prompt)

    def write() -> None:
        clock = Clock()
        model.generate(
            input_ids=prompt, attention_mask=mask, **settings, stopping_criteria=StoppingCriteriaList([clock])
        )
        if between is not None:
            between.extend(clock.between[1:])

    return write


def reader(model: nn.Module, ids: torch.Tensor):
    """A forward without gradients."""
    return torch.no_grad()(lambda: model(input_ids=ids, attention_mask=torch.ones_like(ids)))


def case(name: str, bare: nn.Module, rounds: int) -> dict[str, object]:
    bare = bare.eval()
    config = fastreft.ReftConfig(r=4, positions="f5+l5", task_type="CAUSAL_LM")
    edited = fastreft.get_reft_model(copy.deepcopy(bare, {id(p): p for p in bare.parameters()}), config).eval()
    prompt, ids = torch.randint(5, 900, (1, 16)), torch.randint(5, 900, (4, 128))
    runs, between = {}, {"bare": [], "ReFT": []}
    for kind, model in (("bare", bare), ("ReFT", edited)):
        runs[f"{kind} tokens"] = writer(model, prompt, TOKENS + 1, between[kind])
        runs[f"{kind} prefill"] = reader(model, ids)
        runs[f"{kind} first"] = writer(model, ids, 1)
    times = measure(runs, rounds, budget_s=240)
    token = {kind: median(each) for kind, each in between.items()}
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
