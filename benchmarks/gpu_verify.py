"""What must hold on a GPU beyond the suite, on every road of the launch policy:

outputs and gradients against fp64, two runs bit-equal, a non-default stream, and a captured graph's replay equal to the
eager call bit for bit; so too several replays of an optimizer step whose rate changes in between. ``--small``: a few small
shapes, once each, for compute-sanitizer.

    python benchmarks/gpu_verify.py [--small]
"""

from __future__ import annotations

import argparse
import copy
import itertools

import torch
from torch import Tensor, nn

import fastreft
from fastreft import functional as F
from fastreft import reference

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def problem(n: int, d: int, r: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """h, g (n, d) in dtype; R, W (r, d), b (r,) in fp32 (fp64 where h is)."""
    torch.manual_seed(0)
    wide = F64 if dtype == F64 else F32
    R = torch.linalg.qr(torch.randn(d, r, dtype=F64))[0].T.to(wide)
    W = R + 0.1 * torch.randn(r, d, dtype=F64).to(wide)
    h, g = torch.randn(n, d).to(dtype), torch.randn(n, d).to(dtype)
    return tuple(t.cuda() for t in (h, g, R, W, torch.randn(r).to(wide)))


def gradients(run, h: Tensor, g: Tensor, *weights: Tensor) -> list[Tensor]:
    """The output and the gradients of h and the weights."""
    leaves = [t.detach().clone().requires_grad_() for t in (h, *weights)]
    out = run(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, g)]


def on_rows(rows: Tensor, act: str | None = None):
    return lambda h, R, W, b: F.loreft_rows_(h.clone(), rows, R, W, b, act_fn=act)


def apart_on_rows(rows: Tensor, act: str | None = None):
    """The same into other memory: the launch that edits also copies."""
    return lambda h, R, W, b: F.edit_rows(h, rows, R, W, R, b, act_fn=act)


def exact_rows(rows: Tensor, act=None):
    return lambda h, R, W, b: reference.edit_rows(h, rows, R, W, R, b, act=act)


def as_good(got: list[Tensor], plain: list[Tensor], exact: list[Tensor]) -> bool:
    """The suite's rule: error against fp64 <= 2 x the error of plain torch in the same dtype + one rounding, each error
    relative to its tensor's largest entry, the largest of the tensors' counting."""

    def worst(tensors: list[Tensor]) -> float:
        return max(
            float((x.double() - e).abs().max() / e.abs().max().clamp_min(1e-30))
            for x, e in zip(tensors, exact, strict=True)
        )

    rounding = max(torch.finfo(x.dtype).eps for x in got)
    if got[0].dtype == F64:  # plain torch is the oracle then, whose own roundings count
        rounding *= 64
    return worst(got) <= 2 * worst(plain) + rounding  # false for what is not finite


def check(
    n: int, d: int, r: int, dtype: torch.dtype, rows: Tensor | None, act: str | None, with_graph: bool
) -> dict[str, bool]:
    h, g, *weights = problem(n, d, r, dtype)
    torch_act = {None: None, "silu": torch.nn.functional.silu}[act]
    if rows is None:
        ours = lambda *leaves: F.loreft(*leaves, act_fn=act)  # noqa: E731
        oracle = lambda *leaves: reference.loreft(*leaves, act_fn=torch_act)  # noqa: E731
    else:
        ours, oracle = on_rows(rows, act), exact_rows(rows[rows < n], torch_act)
    got = gradients(ours, h, g, *weights)
    exact = gradients(oracle, h.double(), g.double(), *(w.double() for w in weights))
    plain = gradients(oracle, h, g, *(w.to(dtype) for w in weights))
    result = {"fp64": as_good(got, plain, exact)}
    if rows is not None:
        result["apart"] = all(map(torch.equal, got, gradients(apart_on_rows(rows, act), h, g, *weights)))
    result["again"] = all(map(torch.equal, got, gradients(ours, h, g, *weights)))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        other = gradients(ours, h, g, *weights)
    stream.synchronize()
    result["stream"] = all(map(torch.equal, got, other))
    if not with_graph:
        return result
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(ours, h, g, *weights)
    for t in captured:
        t.zero_()
    graph.replay()
    torch.cuda.synchronize()
    result["graph"] = all(map(torch.equal, got, captured))
    return result


def check_retraction(shapes: list[tuple[int, int]], dtype: torch.dtype) -> dict[str, bool]:
    torch.manual_seed(0)
    given = [(torch.randn(r, d, dtype=F64) / d**0.5).to(dtype).cuda() for r, d in shapes]
    got, again = [m.clone() for m in given], [m.clone() for m in given]
    exact = [m.double() for m in given]
    F.retract_(got)
    F.retract_(again)
    reference.retract_(exact)
    eps = torch.finfo(dtype).eps
    # A retraction moves by its input's rounding times the condition, which is below 100 for these.
    return {
        "fp64": all(float((x.double() - e).abs().max()) < 100 * eps for x, e in zip(got, exact, strict=True)),
        "again": all(map(torch.equal, got, again)),
    }


def apart(R: Tensor) -> float:
    """How far R is from orthonormal rows."""
    return float((R @ R.T - torch.eye(len(R), dtype=R.dtype, device=R.device)).abs().max())


def check_step(shapes: list[tuple[int, int]], dtype: torch.dtype, with_graph: bool) -> dict[str, bool]:
    """Five optimizer steps, ages and rate on the device, replayed where a graph may be captured, against given numbers."""
    torch.manual_seed(0)
    modules = nn.ModuleList(fastreft.LoreftIntervention(embed_dim=d, low_rank_dimension=r) for r, d in shapes)
    eager = modules.to("cuda", dtype)
    other = copy.deepcopy(eager)
    lr = torch.tensor(0.5, device="cuda")
    plain = fastreft.ReftAdamW(fastreft.param_groups(eager, lr=0.5, weight_decay=0.1))
    live = fastreft.ReftAdamW(fastreft.param_groups(other, lr=lr, weight_decay=0.1), capturable=True)
    pairs = list(zip(eager.parameters(), other.parameters(), strict=True))
    for p, q in pairs:
        p.grad, q.grad = torch.randn_like(p), torch.empty_like(p)
    graph = None
    for step in range(5):
        for group in plain.param_groups:
            group["lr"] = 0.5**step  # exact in fp32
        lr.fill_(0.5**step)
        for p, q in pairs:
            q.grad.copy_(p.grad.normal_())
        plain.step()
        if graph is not None:
            graph.replay()
        else:
            live.step()
        if with_graph and graph is None:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                live.step()
    torch.cuda.synchronize()
    return {
        "same": all(torch.equal(p, q) for p, q in pairs),
        "orthonormal": all(apart(m.R.detach().double()) <= max(4 * torch.finfo(dtype).eps, 1e-12) for m in other),
        "skipped none": live.skipped() == 0,
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--small", action="store_true")
    small = options.parse_args().small
    listed = torch.tensor([3, -1, 7, 0, 5, 18, 2, 11]).cuda()
    if small:
        cases = [
            (40, 1024, 8, BF16, None, None),
            (40, 4096, 16, BF16, listed, None),
            (33, 1024, 50, F16, None, "silu"),
            (19, 61, 5, F32, listed, "silu"),
        ]
        matrices = [(4, 1100), (20, 64), (70, 80)]
    else:
        shapes = [
            (1, 64, 1),
            (333, 768, 4),
            (2000, 4096, 8),
            (700, 4096, 32),
            (300, 5120, 16),
            (300, 4096, 64),
            (77, 1001, 3),
        ]
        cases = [
            (n, d, r, dtype, rows, act)
            for (n, d, r), dtype, rows, act in itertools.product(
                shapes, (BF16, F16, F32, F64), (None, listed), (None, "silu")
            )
            if rows is None or n > 18
        ]
        matrices = [(4, 4096), (8, 4096), (64, 8192), (16, 2048), (128, 1024), (1, 64)]
    failed = 0
    for case in cases:
        result = check(*case, with_graph=not small)  # gpu_check.sh runs the small ones without the caching allocator
        good = all(result.values())
        failed += not good
        if not good or small:
            print("ok  " if good else "FAIL", *case[:4], "rows" if case[4] is not None else "dense", case[5], result)
    for dtype in (F32, BF16) if small else (F32, F64, BF16):
        result = check_retraction(matrices, dtype)
        failed += not all(result.values())
        print("ok  " if all(result.values()) else "FAIL", "retraction", dtype, result)
        result = check_step([(r, d) for r, d in matrices if r < d], dtype, with_graph=not small)
        failed += not all(result.values())
        print("ok  " if all(result.values()) else "FAIL", "optimizer step", dtype, result)
    print(f"{len(cases)} edits, {failed} failures")
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
