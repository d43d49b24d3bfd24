"""Distributed alignment search beside pyvene's: hierarchical equality by its tutorial's protocol, and a training step at d =
4096.

    python benchmarks/bench_das.py                 # both; pyvene's column where it is installed: pip install --no-deps pyvene
    python benchmarks/bench_das.py --epochs 1 --pairs 64000 --seeds 42

Both search the same network with the same pairs: a rotation of 16 x 16, 8 dimensions a variable, at the first layer, batches of
6,400, Adam at 1e-3, ten epochs of 1,280,000 pairs; IIA on 12,800 others. A network's seed matters more than anything else
here, so there are several. The two searches of a network follow one another, and a step's time is the median of its steps; of
the step alone at d = 4096 the variants take turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median
from typing import Any

import harness
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastreft import ReftAdamW
from fastreft.causal import Das, Pairs, Subspace, equality

BATCH = 6400
HALF = {"WX": list(range(8)), "YZ": list(range(8, 16))}


def pyvene_search(network: nn.Module) -> tuple[Callable[[Pairs], Tensor], torch.optim.Optimizer] | None:
    """A function from pairs to logits, and the optimizer, as pyvene's tutorial has them; None where there is no pyvene."""
    try:
        import pyvene
        from pyvene.models.mlp.modelings_mlp import MLPConfig
    except ImportError:
        return None
    config = MLPConfig(h_dim=16, activation_function="relu", n_layer=3, num_classes=2, pdrop=0.0)
    _, _, model = pyvene.create_mlp_classifier(config)
    names = {f"mlp.h.{i}.ff1.{kind}": f"h.{i}.0.{kind}" for i in range(3) for kind in ("weight", "bias")}
    held = network.state_dict()
    model.load_state_dict({k: held[names.get(k, k)] for k in model.state_dict()})
    place = pyvene.RepresentationConfig(0, "block_output", "pos", 1, subspace_partition=None, intervention_link_key=0)
    both = pyvene.IntervenableConfig(
        model_type=type(model),
        representations=[place, place],
        intervention_types=pyvene.RotatedSpaceIntervention,
    )
    search = pyvene.IntervenableModel(both, model, use_fast=True)
    search.disable_model_gradients()
    first = next(iter(search.interventions.values()))
    optimizer = torch.optim.Adam(first.rotate_layer.parameters(), lr=1e-3)

    def logits(pairs: Pairs) -> Tensor:
        n = len(pairs.labels)
        sources: list[Any] = [None, None]
        where: list[Any] = [None, None]
        subspaces: list[Any] = [None, None]
        for i, name in enumerate(HALF):
            if name in pairs.sources:
                sources[i] = {"inputs_embeds": pairs.sources[name].unsqueeze(1)}
                where[i], subspaces[i] = [[0]] * n, [HALF[name]] * n
        base = {"inputs_embeds": pairs.base.unsqueeze(1)}
        _, outputs = search(base, sources, {"sources->base": (where, list(where))}, subspaces=subspaces)
        return outputs[0].reshape(n, 2)

    return logits, optimizer


def batches_of(sets: list[Pairs], seed: int) -> list[Pairs]:
    cut = [
        Pairs(
            each.base[i : i + BATCH],
            {name: source[i : i + BATCH] for name, source in each.sources.items()},
            each.labels[i : i + BATCH],
        )
        for each in sets
        for i in range(0, len(each.labels), BATCH)
    ]
    order = torch.randperm(len(cut), generator=torch.Generator().manual_seed(seed)).tolist()
    return [cut[i] for i in order]


def iia(logits: Callable[[Pairs], Tensor], sets: list[Pairs]) -> float:
    with torch.no_grad():
        right = [logits(pairs).argmax(1) == pairs.labels for pairs in batches_of(sets, 0)]
    return float(torch.cat(right).float().mean())


def equality_row(seed: int, pairs: int, epochs: int) -> dict[str, object]:
    causal = equality.causal_model()
    began = time.perf_counter()
    network = equality.trained(causal, seed)
    row: dict[str, object] = {"network": seed, "accuracy": equality.accuracy(network, causal)}
    row["its seconds"] = time.perf_counter() - began
    each = -(-pairs // (3 * BATCH)) * BATCH
    train = [causal.pairs(each, names, 100 + i).encoded(equality.encode) for i, names in enumerate(equality.VARIABLES)]
    test = [causal.pairs(4267, names, 200 + i).encoded(equality.encode) for i, names in enumerate(equality.VARIABLES)]

    torch.manual_seed(seed)
    das = Das(network, "h.0", Subspace(16, {name: 8 for name in HALF}))
    row["localist IIA"] = Das(network, "h.0", Subspace.of(torch.eye(16), {name: 8 for name in HALF})).iia(test)
    row["random IIA"] = das.iia(test)
    began, steps = time.perf_counter(), []

    def stamped(step: int, loss: float) -> None:
        steps.append(time.perf_counter())

    das.train(train, epochs=epochs, batch_size=BATCH, lr=1e-3, decay=False, seed=seed, log=stamped)
    row["ours s"], row["ours IIA"] = time.perf_counter() - began, das.iia(test)
    row["ours ms a step"] = 1e3 * median(b - a for a, b in pairwise(steps))

    torch.manual_seed(seed)
    made = pyvene_search(network)
    if made is None:
        return row
    logits, optimizer = made
    began, steps = time.perf_counter(), []
    for epoch in range(epochs):
        for batch in batches_of(train, seed + epoch):
            optimizer.zero_grad()
            F.cross_entropy(logits(batch), batch.labels).backward()
            optimizer.step()
            steps.append(time.perf_counter())
    row["pyvene s"], row["pyvene IIA"] = time.perf_counter() - began, iia(logits, test)
    row["pyvene ms a step"] = 1e3 * median(b - a for a, b in pairwise(steps))
    return row


def step_row(d: int, r: int, n: int, rounds: int) -> dict[str, object]:
    """A training step of the intervention alone: forward, backward and the optimizer's, for n rows."""
    base, source, target = (torch.randn(n, d) for _ in range(3))
    subspace = Subspace(d, r)
    ours = ReftAdamW([{"params": [subspace.R], "lr": 1e-3}])

    def step(module: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
        def run() -> None:
            optimizer.zero_grad()
            F.mse_loss(module(base, source), target).backward()
            optimizer.step()

        return run

    variants = {"ours": step(subspace, ours)}
    try:
        import pyvene

        theirs = pyvene.LowRankRotatedSpaceIntervention(embed_dim=d, low_rank_dimension=r)
        variants["pyvene"] = step(theirs, torch.optim.Adam(theirs.parameters(), lr=1e-3))
    except ImportError:
        pass
    times = harness.measure(variants, rounds)
    row: dict[str, object] = {"d": d, "r": r, "rows": n, **{f"{name} ms": value for name, value in times.items()}}
    if "pyvene" in times:
        row["pyvene / ours"] = times["pyvene"] / times["ours"]
    return row


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--pairs", type=int, default=1_280_000)
    parser.add_argument("--seeds", type=int, nargs="*", default=[42, 0, 1])
    chosen = parser.parse_args()
    harness.keep_heap()
    searches = [equality_row(seed, chosen.pairs, chosen.epochs) for seed in chosen.seeds]
    if searches:
        harness.table("hierarchical equality", searches)
    steps = [step_row(4096, 16, n, chosen.rounds) for n in (32, 256)]
    harness.table("a training step of the intervention", steps)
    if chosen.save:
        harness.save(__file__, {"equality": searches, "step": steps})


if __name__ == "__main__":
    main()
