"""What LoReFT adds to a training step: forward, backward, optimizer, over the same step with one trainable bias.

    python benchmarks/bench_train.py [--only llama|gpt2|wide] [--save]

The floor trains one bias vector at the output of layer 0, so that the backward goes through the whole frozen model. All
variants share the frozen weights. "torch" is LoReFT by hand: a hook that gathers the rows, applies two GEMMs and puts
them back.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import peft
import torch
from harness import measure, parser, save, table
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from fastreft import ReftAdamW, ReftConfig, get_reft_model, param_groups
from fastreft.models.blocks import find_blocks

VOCAB, R, PREFIX, SUFFIX = 1000, 4, 5, 5


def llama(width: int, layers: int, heads: int) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=11 * width // 4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=128, use_cache=False))


CASES: dict[str, tuple[str, Callable[[], PreTrainedModel], tuple[int, int], list[str]]] = {
    "llama": ("Llama 512 x 8 layers, 8 x 128", lambda: llama(512, 8, 8), (8, 128), ["q_proj", "v_proj"]),
    "gpt2": ("GPT-2 768 x 12 layers, 1 x 16", gpt2, (1, 16), ["c_attn"]),
    "wide": ("Llama 4096 x 2 layers, 1 x 64", lambda: llama(4096, 2, 32), (1, 64), ["q_proj", "v_proj"]),
}


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that shares every weight."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


class Bias(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, _block, _args, output):
        return output + self.bias if isinstance(output, torch.Tensor) else (output[0] + self.bias, *output[1:])


class TwoGemm(nn.Module):
    """LoReFT by hand on the first and last rows of each sample."""

    def __init__(self, width: int, rows: torch.Tensor):
        super().__init__()
        self.R = nn.Parameter(torch.linalg.qr(torch.randn(width, R))[0].T.contiguous())
        self.W, self.b = nn.Parameter(torch.randn(R, width) * width**-0.5), nn.Parameter(torch.zeros(R))
        self.rows = rows

    def forward(self, _block, _args, output):
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        flat = hidden.view(-1, hidden.shape[-1])
        x = flat[self.rows]
        z = torch.addmm(self.b, x, (self.W - self.R).T)
        flat.index_copy_(0, self.rows, torch.addmm(x, z, self.R))


def step_of(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    def step() -> None:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    model.train()
    return step


def case(name: str, rounds: int) -> dict[str, object]:
    title, make, (batch_size, length), lora_targets = CASES[name]
    torch.manual_seed(0)
    base = make().requires_grad_(False)
    width = base.get_input_embeddings().weight.shape[1]
    ids = torch.randint(VOCAB, (batch_size, length))
    labels = ids.clone()
    labels[:, : length // 2] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    ours_prompt = length // 2
    columns = [*range(PREFIX), *range(ours_prompt - SUFFIX, ours_prompt)]
    rows = torch.tensor([b * length + c for b in range(batch_size) for c in columns])

    floor = twin(base)
    bias = Bias(width)
    find_blocks(floor).modules[0].register_forward_hook(bias)
    by_hand = twin(base)
    edits = nn.ModuleList(TwoGemm(width, rows) for _ in find_blocks(by_hand).modules)
    for block, edit in zip(find_blocks(by_hand).modules, edits, strict=True):
        block.register_forward_hook(edit)
    reft = get_reft_model(twin(base), ReftConfig(r=R, positions=f"f{PREFIX}+l{SUFFIX}"))
    lora = peft.get_peft_model(twin(base), peft.LoraConfig(r=R, target_modules=lora_targets))
    adamw = torch.optim.AdamW
    steps = {
        "floor": step_of(floor, adamw(bias.parameters()), batch),
        "ours": step_of(reft, ReftAdamW(param_groups(reft, lr=1e-4)), batch),
        "torch": step_of(by_hand, adamw(edits.parameters()), batch),
        "LoRA": step_of(lora, adamw([p for p in lora.parameters() if p.requires_grad]), batch),
    }
    theirs = pyreft_step(base, batch, columns)
    if theirs is not None:
        steps["pyreft"] = theirs
    times = measure(steps, rounds, budget_s=100)
    result: dict[str, object] = {"case": title, "floor ms": times["floor"]}
    return result | {f"{kind}/floor": times[kind] / times["floor"] for kind in times if kind != "floor"}


def pyreft_step(base: PreTrainedModel, batch: dict[str, torch.Tensor], columns: list[int]) -> Callable[[], None] | None:
    """The same in pyreft, where it is installed and runs with this Transformers."""
    try:
        import pyreft
    except ImportError:
        return None
    width = base.get_input_embeddings().weight.shape[1]
    layers = range(len(find_blocks(base).names))
    config = pyreft.ReftConfig(
        representations=[
            {
                "layer": layer,
                "component": "block_output",
                "low_rank_dimension": R,
                "intervention": pyreft.LoreftIntervention(embed_dim=width, low_rank_dimension=R, dtype=torch.float32),
            }
            for layer in layers
        ]
    )
    model = pyreft.get_reft_model(twin(base), config)
    trainable = [
        p
        for i in model.interventions.values()
        for p in getattr(i, "__iter__", lambda i=i: [i])()
        for p in p.parameters()
    ]
    optimizer = torch.optim.AdamW(trainable)
    locations = {"sources->base": (None, [[columns] * len(batch["input_ids"])] * len(layers))}

    def step() -> None:
        _, output = model(
            {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]},
            unit_locations=locations,
            labels=batch["labels"],
        )
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--only", choices=tuple(CASES))
    options = arguments.parse_args()
    results = [case(name, options.rounds) for name in ([options.only] if options.only else CASES)]
    table("A training step, over the same step with one trainable bias at layer 0 (medians)", results)
    if options.save:
        save(__file__, results)


if __name__ == "__main__":
    main()
