"""The six edits with weights to try them on, and their comparison with plain torch and fp64."""

from __future__ import annotations

import torch
from common import assert_as_good

from fastreft import functional as F
from fastreft import reference
from fastreft.ops import activations

FAMILY = ("loreft", "noreft", "direft", "nodireft", "consreft", "lobireft")
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
]


def weights(
    method: str, d: int, r: int, dtype: torch.dtype, device: str = "cpu", bias: bool = False
) -> list[torch.Tensor]:
    """Weights in the order of functional.<method>."""
    R = torch.linalg.qr(torch.randn(d, r, dtype=torch.float64))[0].T
    W, b, c = R + 0.3 * torch.randn(r, d), torch.randn(r), torch.randn(r)
    made = [R, b] if method in ("consreft", "lobireft") else [R, W, b]
    if method == "noreft" and bias:
        made.append(c)
    return [w.to(device, dtype).contiguous() for w in made]


def gradients(run, h, ws, g):
    leaves = [t.detach().clone().requires_grad_() for t in (h, *ws)]
    out = run(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, g)]


def compare(method, h, ws, act=None, rows=None, close=None):
    """Ours, plain torch in the same dtype, and fp64: outputs and all gradients by the tolerance rule.

    Wider weights than rows are rounded to the rows' dtype in plain torch, as one does by hand to multiply them.
    ``close`` replaces the rule where a handful of values makes it a matter of luck and the indexing is what is tested.
    """
    has_act = method not in ("consreft", "lobireft")
    g = torch.randn(h.shape, dtype=torch.float64).to(h.device)
    fn = activations.torch_fn(act) if act else None

    def ours(h, *ws):
        extra = {"act_fn": act} if has_act else {}
        if rows is None:
            return getattr(F, method)(h, *ws, **extra)
        return getattr(F, f"{method}_rows_")(h * 1, rows, *ws, **extra)

    def plain(h, *ws):
        dense = getattr(reference, method)(h, *ws, **({"act_fn": fn} if has_act else {}))
        if rows is None:
            return dense
        chosen = torch.zeros(h.shape[:-1], dtype=torch.bool, device=h.device)
        chosen.view(-1)[rows[rows >= 0]] = True
        return torch.where(chosen[..., None], dense, h)

    got = gradients(ours, h, ws, g.to(h.dtype))
    same = gradients(plain, h, [w.to(h.dtype) for w in ws], g.to(h.dtype))
    exact = gradients(plain, h.double(), [w.double() for w in ws], g.to(h.dtype).double())
    if close is not None:
        torch.testing.assert_close(
            got, [e.to(a.dtype) for a, e in zip(got, exact, strict=True)], rtol=close, atol=close
        )
        return
    for part in (slice(0, 1), slice(1, 2), slice(2, None)):  # the output, dh, the weights' gradients
        assert_as_good(got[part], same[part], exact[part])
