"""One optimizer step of 32 rotation matrices, AdamW with retraction, against torch ops and against pyreft's way.

    python benchmarks/bench_optim.py [--save]

torch's variants take the same step (projected gradient, Adam, Cholesky retraction) matrix by matrix, and on one stacked
batch. pyreft evaluates a Householder parametrization in every forward and goes back through it in every backward
(three times a forward in fact; once is counted here): that, for all matrices, is what the retraction replaces.
"""

from __future__ import annotations

import torch
from harness import measure, parser, save, table
from torch import Tensor, nn

from fastreft import ReftAdamW, functional
from fastreft.interventions import LoreftIntervention

LR, EPS, BETA1, BETA2 = 1e-3, 1e-8, 0.9, 0.999


@torch.no_grad()
def torch_step(R: Tensor, G: Tensor, m: Tensor, v: Tensor, step: int) -> None:
    """The step in torch ops; R may be (r, d) or a stack of them."""
    A = G @ R.mT
    G = G - 0.5 * (A + A.mT) @ R
    m.lerp_(G, 1 - BETA1)
    v.mul_(BETA2).addcmul_(G, G, value=1 - BETA2)
    Y = R - 2 * LR * (m / (1 - BETA1**step)) / ((v / (1 - BETA2**step)).sqrt_() + EPS)
    wide = Y.double()
    L = torch.linalg.cholesky(wide @ wide.mT)
    R.copy_(torch.linalg.solve_triangular(L, wide, upper=False))


class Rotation(nn.Module):
    """pyreft's LowRankRotateLayer, word for word in torch: weight (d, r), Householder parametrization."""

    def __init__(self, d: int, r: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d, r))
        nn.init.orthogonal_(self.weight)


def case(r: int, count: int, rounds: int) -> dict[str, object]:
    torch.manual_seed(0)
    d = 4096
    modules = [LoreftIntervention(embed_dim=d, low_rank_dimension=r) for _ in range(count)]
    Rs = [module.R for module in modules]
    for R in Rs:
        R.grad = torch.randn_like(R)
    ours = ReftAdamW(Rs, lr=LR)
    grads = [R.grad.clone() for R in Rs if R.grad is not None]
    lone = [[R.detach().clone(), g, torch.zeros_like(g), torch.zeros_like(g)] for R, g in zip(Rs, grads, strict=True)]
    stacked = [torch.stack(column) for column in zip(*lone, strict=True)]
    copies = [R.detach().clone() for R in Rs]

    def one_by_one() -> None:
        for state in lone:
            torch_step(*state, step=10)

    rotation = torch.nn.utils.parametrizations.orthogonal(Rotation(d, r))
    upstream = torch.randn(d, r)

    def pyreft() -> None:
        rotation.parametrizations.weight.original.grad = None
        (rotation.weight * upstream).sum().backward()

    times = measure(
        {
            "ours": ours.step,
            "retract": lambda: functional.retract_(copies),
            "one by one": one_by_one,
            "stacked": lambda: torch_step(*stacked, step=10),
        },
        rounds,
    )
    one = measure({"pyreft": pyreft}, 5, warmup=1, budget_s=10)["pyreft"]
    torch_best = min(times["one by one"], times["stacked"])
    return {
        "case": f"{count} x ({r} x {d})",
        "ours ms": times["ours"],
        "retraction alone": times["retract"],
        "torch one by one": times["one by one"],
        "torch stacked": times["stacked"],
        "torch/ours": torch_best / times["ours"],
        "pyreft, one matrix": one,
        "pyreft/ours": one * count / times["ours"],
    }


def main() -> None:
    options = parser(__doc__).parse_args()
    results = [case(r, 32, options.rounds) for r in (4, 8)]
    table("AdamW + retraction of 32 matrices (ms, medians)", results)
    if options.save:
        save(__file__, results)


if __name__ == "__main__":
    main()
