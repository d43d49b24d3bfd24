"""The edits as functions: what people call, and what the modules call.

Every function takes h of shape (..., d) in fp32, bf16, fp16 or fp64 and weights R, P, W (r, d), b, c (r,) in any of
those dtypes (fp32 masters with a bf16 h cost nothing extra); sums run in fp32 (fp64 where h is fp64) and the
result has h's dtype. ``act_fn`` is None, a name of Transformers' ``ACT2FN``, or a callable; a callable runs outside
the fused kernels. The ``*_rows_`` forms edit the rows of ``h.reshape(-1, d)`` listed in ``rows`` (any integer
dtype) in place and return h: -1 is skipped, a row listed twice is edited once, a row past the end is an
``IndexError`` on a CPU and skipped on a GPU (no report without a sync).

All are differentiable in h and the weights, and give the same bits for the same input.
Source: ReFT (Wu et al. 2024, arXiv 2404.03592), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .ops import step
from .ops.activations import ActFn
from .ops.edit import IN_PLACE, NEW
from .ops.edit import edit as _edit
from .ops.edit import interchange as _interchange


def edit(
    h: Tensor,
    U: Tensor,
    V: Tensor | None = None,
    P: Tensor | None = None,
    b: Tensor | None = None,
    c: Tensor | None = None,
    *,
    act_fn: ActFn = None,
) -> Tensor:
    """The one primitive: h + U^T (act(V h + b) - P h - c), a new tensor of h's shape and dtype; None leaves a term out."""
    return _edit(h, (U, V, P, b, c), act_fn)


def edit_rows_(
    h: Tensor,
    rows: Tensor,
    U: Tensor,
    V: Tensor | None = None,
    P: Tensor | None = None,
    b: Tensor | None = None,
    c: Tensor | None = None,
    *,
    act_fn: ActFn = None,
    unique: bool = False,
) -> Tensor:
    """The one primitive on the listed rows of h.reshape(-1, d), in place; returns h.

    ``unique`` promises that no row is listed twice, which saves a GPU the looking.
    """
    return _edit(h, (U, V, P, b, c), act_fn, rows, IN_PLACE, unique)


def edit_rows(
    h: Tensor,
    rows: Tensor,
    U: Tensor,
    V: Tensor | None = None,
    P: Tensor | None = None,
    b: Tensor | None = None,
    c: Tensor | None = None,
    *,
    act_fn: ActFn = None,
    unique: bool = False,
) -> Tensor:
    """As :func:`edit_rows_`, but h is left alone and a new tensor returned: the form for ``torch.compile``."""
    return _edit(h, (U, V, P, b, c), act_fn, rows, NEW, unique)


def loreft(h: Tensor, R: Tensor, W: Tensor, b: Tensor, *, act_fn: ActFn = None) -> Tensor:
    """LoReFT: h + R^T (act(W h + b) - R h). R has orthonormal rows (see :func:`retract_`)."""
    return edit(h, R, W, R, b, act_fn=act_fn)


def loreft_rows_(h: Tensor, rows: Tensor, R: Tensor, W: Tensor, b: Tensor, *, act_fn: ActFn = None) -> Tensor:
    """:func:`loreft` on the listed rows, in place."""
    return edit_rows_(h, rows, R, W, R, b, act_fn=act_fn)


def noreft(h: Tensor, P: Tensor, W: Tensor, b: Tensor, c: Tensor | None = None, *, act_fn: ActFn = None) -> Tensor:
    """NoReFT: h + P^T (act(W h + b) - P h - c). P is free; c (r,) is the bias of P (pyreft's add_bias)."""
    return edit(h, P, W, P, b, c, act_fn=act_fn)


def noreft_rows_(
    h: Tensor, rows: Tensor, P: Tensor, W: Tensor, b: Tensor, c: Tensor | None = None, *, act_fn: ActFn = None
) -> Tensor:
    """:func:`noreft` on the listed rows, in place."""
    return edit_rows_(h, rows, P, W, P, b, c, act_fn=act_fn)


def direft(h: Tensor, R: Tensor, W: Tensor, b: Tensor, *, act_fn: ActFn = None) -> Tensor:
    """pyreft's DiReFT: h + R^T act(W h + b), R with orthonormal rows."""
    return edit(h, R, W, None, b, act_fn=act_fn)


def direft_rows_(h: Tensor, rows: Tensor, R: Tensor, W: Tensor, b: Tensor, *, act_fn: ActFn = None) -> Tensor:
    """:func:`direft` on the listed rows, in place."""
    return edit_rows_(h, rows, R, W, None, b, act_fn=act_fn)


def nodireft(h: Tensor, P: Tensor, W: Tensor, b: Tensor, *, act_fn: ActFn = None) -> Tensor:
    """The paper's DiReFT: h + P^T act(W h + b), P free."""
    return edit(h, P, W, None, b, act_fn=act_fn)


def nodireft_rows_(h: Tensor, rows: Tensor, P: Tensor, W: Tensor, b: Tensor, *, act_fn: ActFn = None) -> Tensor:
    """:func:`nodireft` on the listed rows, in place."""
    return edit_rows_(h, rows, P, W, None, b, act_fn=act_fn)


def consreft(h: Tensor, R: Tensor, b: Tensor) -> Tensor:
    """ConsReFT: h + R^T (b - R h): the subspace that R spans is set to b."""
    return edit(h, R, None, R, b)


def consreft_rows_(h: Tensor, rows: Tensor, R: Tensor, b: Tensor) -> Tensor:
    """:func:`consreft` on the listed rows, in place."""
    return edit_rows_(h, rows, R, None, R, b)


def lobireft(h: Tensor, R: Tensor, b: Tensor) -> Tensor:
    """LobiReFT: h + R^T b."""
    return edit(h, R, None, None, b)


def lobireft_rows_(h: Tensor, rows: Tensor, R: Tensor, b: Tensor) -> Tensor:
    """:func:`lobireft` on the listed rows, in place."""
    return edit_rows_(h, rows, R, None, None, b)


def interchange(h: Tensor, s: Tensor, R: Tensor, mask: Tensor | None = None) -> Tensor:
    """An interchange intervention: h + R^T (mask * (R s - R h)), a new tensor of h's shape and dtype.

    h and s (..., d) alike, ``mask`` (r,) or None for ones. Differentiable in all four. ``ValueError`` where s has not h's
    shape. Source: Distributed Alignment Search (Geiger et al. 2023, arXiv 2303.02536).
    """
    return _interchange(h, s, R, mask)


def interchange_rows_(h: Tensor, rows: Tensor, s: Tensor, R: Tensor, mask: Tensor | None = None) -> Tensor:
    """:func:`interchange` on the listed rows of h.reshape(-1, d), in place; returns h.

    ``rows`` (n,) integers, none twice, -1 = skip; s (n, d), a source for each. A GPU is waited for.
    """
    return _interchange(h, s, R, mask, rows, IN_PLACE)


def retract_(matrices: Sequence[Tensor]) -> None:
    """Give each matrix R (r, d), r <= d, orthonormal rows, in place: R <- L^-1 R, R R^T = L L^T. One launch a device.

    Grams and factors in fp64. A matrix whose rows are zero or dependent takes the Householder QR with a positive
    diagonal instead: a defined orthonormal completion. A value that is not finite is a ``ValueError`` naming the
    matrix, and then no matrix is changed. Works on leaves that require gradients; not differentiable.
    """
    step.retract_(list(matrices))
