"""vLLM's engine with many adapters in a batch: the bare model, ours, and vLLM's own LoRA, by the number of distinct adapters.

    .venv-vllm/bin/python benchmarks/bench_vllm.py [--save] [--model FOLDER]

64 requests at a time of 32 random tokens, 16 written after each, greedy, none from the prefix cache; LoReFT r = 4, f5+l5, and
LoRA r = 8 on all linear layers. The engines are alive together, one a process, and take turns. All are eager, as vLLM compiles
no model with LoRA on a CPU.
"""

from __future__ import annotations

import os
import tempfile
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from harness import measure, parser, save, table

REQUESTS, PROMPT, TOKENS = 64, 32, 16
COUNTS = (1, 8, 64)


def make_adapters(model: str, folder: Path) -> None:
    """Adapters of both kinds that change something, ``folder/<kind>/a<i>``."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    import fastreft

    for kind in ("reft", "lora"):
        for i in range(max(COUNTS)):
            torch.manual_seed(i)
            base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
            config: Any = fastreft.ReftConfig(r=4, positions="f5+l5", task_type="CAUSAL_LM", init_weights="random")
            if kind == "lora":
                config = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
            adapted = get_peft_model(base, config)
            adapted.save_pretrained(str(folder / kind / f"a{i}"), save_embedding_layers=False)


def engine(kind: str, model: str, folder: Path, orders: Connection) -> None:
    """An engine in a process: for each number of adapters that comes, all requests once, and then an answer."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "FASTREFT_ADAPTERS": str(folder / "reft") if kind == "reft" else "",
    }  # fmt: skip
    import torch
    import vllm
    from vllm.lora.request import LoRARequest

    lora = {"enable_lora": True, "max_loras": max(COUNTS), "max_lora_rank": 8} if kind == "lora" else {}
    llm = vllm.LLM(
        model, dtype="float32", max_model_len=128, enforce_eager=True, max_num_seqs=REQUESTS,
        enable_prefix_caching=False, **lora,
    )  # fmt: skip
    vocabulary = llm.model_config.get_vocab_size()
    ids = torch.randint(5, vocabulary, (REQUESTS, PROMPT), generator=torch.Generator().manual_seed(0)).tolist()
    prompts = [{"prompt_token_ids": each} for each in ids]
    orders.send("ready")
    while count := orders.recv():
        names = [f"a{i % abs(count)}" for i in range(REQUESTS)]
        ours = kind == "reft" and count > 0
        settings = [
            vllm.SamplingParams(
                max_tokens=TOKENS, temperature=0, ignore_eos=True, extra_args={"reft": name} if ours else None
            )
            for name in names
        ]
        loras = [LoRARequest(name, 1 + int(name[1:]), str(folder / "lora" / name)) for name in names]
        found = llm.generate(
            prompts, settings, use_tqdm=False, lora_request=loras if kind == "lora" and count > 0 else None
        )
        orders.send([each.outputs[0].token_ids[-1] for each in found])


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--model", help="a folder; the embedded model if not given")
    chosen = arguments.parse_args()
    from fastreft.settings import EMBEDDED_PATH

    model = chosen.model or str(EMBEDDED_PATH)
    with tempfile.TemporaryDirectory() as folder:
        make_adapters(model, Path(folder))
        context, ends, processes = get_context("spawn"), {}, []
        for kind in ("bare", "reft", "lora"):
            ends[kind], theirs = context.Pipe()
            processes.append(context.Process(target=engine, args=(kind, model, Path(folder), theirs)))
            processes[-1].start()
            assert ends[kind].recv() == "ready"  # one after the other: each measures what memory is free

        def turn(kind: str, count: int) -> Any:
            def run() -> Any:
                ends[kind].send(count)
                return ends[kind].recv()

            return run

        # -1: an engine that could have adapters and is asked for none
        variants = {("bare", "none"): turn("bare", -1)}
        variants |= {(kind, "none"): turn(kind, -1) for kind in ("reft", "lora")}
        variants |= {(kind, str(count)): turn(kind, count) for count in COUNTS for kind in ("reft", "lora")}
        times = measure({" ".join(key): run for key, run in variants.items()}, rounds=chosen.rounds, budget_s=600)
        for kind, process in zip(ends, processes, strict=True):
            ends[kind].send(0)
            process.join()
    rows: list[dict[str, Any]] = []
    for kind, count in variants:
        taken = times[f"{kind} {count}"]
        rows.append({"model": Path(model).name, "engine": kind, "adapters": count})
        rows[-1] |= {"tokens/s": 1e3 * REQUESTS * TOKENS / taken, "of bare": times["bare none"] / taken}
    table("64 requests, 32 tokens + 16", rows)
    if chosen.save:
        save(__file__, rows)


if __name__ == "__main__":
    main()
