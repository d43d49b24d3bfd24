"""The LoReFT edit, rows and dense, forward and forward+backward, against torch and against pyreft's own module.

    python benchmarks/bench_edit.py [--only rows|dense] [--save]

torch's variants are what one would write by hand: z = h (W - R)^T + b, out = h + z R, eager, as an autograd.Function,
and compiled; rows with a gather before and an index_copy_ after. The best of the three is what we are compared with.
Dense results are large: they are measured as the C library hands out memory (freshly mapped pages for each result) and
again with the heap kept, which leaves the work itself.
"""

from __future__ import annotations

import torch
from harness import keep_heap, measure, parser, pyreft_module, save, table
from torch import Tensor

from fastreft import functional as F

torch.set_float32_matmul_precision("highest")


def two_gemm(h: Tensor, R: Tensor, W: Tensor, b: Tensor) -> Tensor:
    z = torch.addmm(b.to(h.dtype), h, (W - R).to(h.dtype).T)
    return torch.addmm(h, z, R.to(h.dtype))


class TwoGemm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, R, W, b):
        D = (W - R).to(h.dtype)
        z = torch.addmm(b.to(h.dtype), h, D.T)
        ctx.save_for_backward(h, R, D, z)
        return torch.addmm(h, z, R.to(h.dtype))

    @staticmethod
    def backward(ctx, g):
        h, R, D, z = ctx.saved_tensors
        gz = g @ R.to(g.dtype).T
        dW = (gz.T @ h).to(R.dtype)
        return torch.addmm(g, gz, D), (z.T @ g).to(R.dtype) - dW, dW, gz.sum(0).to(R.dtype)


def pair(run, h: Tensor, g: Tensor, weights, trains: bool):
    """run on h, or with its backward: gradients of h and the weights handed out, not summed into .grad."""
    if not trains:
        return no_grad(lambda: run(h, *weights))
    leaves = [t.detach().requires_grad_() for t in (h, *weights)]
    return lambda: torch.autograd.grad(run(*leaves), leaves, g)


def case(kind: str, n: int, d: int, r: int, dtype: torch.dtype, wide: torch.dtype, rounds: int) -> dict[str, object]:
    torch.compiler.reset()  # each case is compiled afresh, not as one more variant of the last
    torch.manual_seed(0)
    R = torch.linalg.qr(torch.randn(d, r))[0].T.contiguous().to(wide)
    weights = (R, (R.float() + 0.01 * torch.randn(r, d)).to(wide), torch.zeros(r, dtype=wide))
    total = 8 * 128 if kind == "rows" else n
    h, g = torch.randn(total, d).to(dtype), torch.randn(total, d).to(dtype)
    rows = torch.arange(n) * (total // n)
    out: dict[str, object] = {"case": f"{kind} {n} x {d}", "r": r, "h": str(dtype)[6:], "weights": str(wide)[6:]}
    compiled = torch.compile(two_gemm, dynamic=False)
    theirs = pyreft_module(d, r, dtype) if kind == "rows" else None
    for trains in (False, True):
        if kind == "dense":
            variants = {"ours": F.loreft, "eager": two_gemm, "function": TwoGemm.apply, "compiled": compiled}
            runs = {name: pair(run, h, g, weights, trains) for name, run in variants.items()}
            runs["clone"] = h.clone
        elif not trains:
            # In place, again and again on one buffer.
            runs = {
                "ours": lambda: F.loreft_rows_(h, rows, *weights),
                "eager": lambda: h.index_copy_(0, rows, two_gemm(h[rows], *weights)),
                "function": lambda: h.index_copy_(0, rows, TwoGemm.apply(h[rows], *weights)),
                "compiled": lambda: h.index_copy_(0, rows, compiled(h[rows], *weights)),
            }
            runs = {name: no_grad(run) for name, run in runs.items()}
        else:
            # A clone of the listed rows alone stands for the model's state: autograd edits no leaf in place. All pay it.
            every, x, gx = torch.arange(n), h[rows], g[rows]
            variants = {
                "ours": lambda h, *w, i=every: F.loreft_rows_(h.clone(), i, *w),
                "eager": lambda h, *w, i=every: index_copy(h, i, two_gemm(h[i], *w)),
                "function": lambda h, *w, i=every: index_copy(h, i, TwoGemm.apply(h[i], *w)),
                "compiled": lambda h, *w, i=every: index_copy(h, i, compiled(h[i], *w)),
            }
            runs = {name: pair(run, x, gx, weights, True) for name, run in variants.items()}
        times = measure(runs, rounds, settle=4)
        label = "fwd+bwd" if trains else "fwd"
        best = min(times[name] for name in ("eager", "function", "compiled"))
        out |= {f"{label} ms": times["ours"], f"best torch {label}": best, f"torch/ours {label}": best / times["ours"]}
        if kind == "dense":
            out[f"ours/clone {label}"] = times["ours"] / times["clone"]
        if theirs is not None:
            pyreft_ms = measure({"pyreft": pyreft_run(theirs, h[rows][None], g[rows][None], trains)}, 5, 1, 6)["pyreft"]
            out |= {f"pyreft {label}": pyreft_ms, f"pyreft/ours {label}": pyreft_ms / times["ours"]}
    return out


def index_copy(h: Tensor, rows: Tensor, new: Tensor) -> Tensor:
    return h.clone().index_copy_(0, rows, new)


def no_grad(run):
    return torch.no_grad()(run)


def pyreft_run(module: torch.nn.Module, x: Tensor, g: Tensor, trains: bool):
    """pyreft's module on the gathered rows: without the gather and the scatter that pyvene adds."""
    if not trains:
        return no_grad(lambda: module(x))
    leaf = x.detach().requires_grad_()
    return lambda: torch.autograd.grad(module(leaf), [leaf, *module.parameters()], g)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--only", choices=("rows", "dense"))
    options = arguments.parse_args()
    fp32, bf16 = torch.float32, torch.bfloat16
    results: dict[str, list[dict[str, object]]] = {}
    if options.only != "dense":
        results["rows"] = [
            case("rows", 160, 4096, r, dtype, wide, options.rounds)
            for r in (4, 8)
            for dtype, wide in ((fp32, fp32), (bf16, bf16), (bf16, fp32))
        ]
        table("LoReFT on listed rows, in place (ms, medians)", results["rows"])
    if options.only != "rows":
        for heap in ("fresh", "kept"):
            if heap == "kept" and not keep_heap():
                break
            results[f"dense, {heap} memory"] = [
                case("dense", n, d, r, dtype, dtype, options.rounds)
                for n, d, r in ((8192, 2048, 16), (2048, 4096, 4))
                for dtype in (fp32, bf16)
            ]
            table(f"LoReFT on every row, results in {heap} memory (ms, medians)", results[f"dense, {heap} memory"])
    if options.save:
        save(__file__, results)


if __name__ == "__main__":
    main()
