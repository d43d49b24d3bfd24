"""The ReFT family as modules, with pyreft's keywords and calling convention.

    m = LoreftIntervention(embed_dim=4096, low_rank_dimension=4)
    out = m(base)                 # base (..., d): a new tensor
    m(base, rows=index)           # the listed rows of base.reshape(-1, d), in place; -1 is skipped

The parameters are plain leaves: R, P, W (r, d), b, c (r,). R has orthonormal rows; an optimizer step does not keep
that by itself, :mod:`fastreft.optim` does. R is at least fp32; ``dtype`` (default fp32) is that of W, b, P and c.
Dropout is on the whole output, as in pyreft. ``m(base, None, subspaces)`` edits each sample with some of R's rows.
Source: ReFT (Wu et al. 2024, arXiv 2404.03592), section 3.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .ops import activations, groups, subspaces
from .ops.checks import Weights
from .ops.edit import IN_PLACE, NEW, edit, settled
from .ops.names import STARTS, may_be_identity, unknown_activation

# Every intervention alive, so that an optimizer's parameters can be told apart from other people's.
_alive: weakref.WeakSet[Intervention] = weakref.WeakSet()

# Makes an intervention that a library of other people's has taken one of that library's own, see Intervention.use_fast.
host: Callable[[Intervention], None] | None = None


def activation_module(act_fn: str) -> nn.Module:
    """An activation of Transformers' ``ACT2FN`` that has no fused form, as a module (it may hold parameters)."""
    try:
        from transformers.activations import ACT2FN
    except ImportError as error:
        raise unknown_activation(act_fn) from error
    if act_fn not in ACT2FN:
        raise unknown_activation(act_fn)
    return ACT2FN[act_fn]


class Intervention(nn.Module):
    """The edit h + U^T (act(V h + b) - P h - c); a subclass says what U, V, P, b and c are.

    ``embed_dim`` d and ``low_rank_dimension`` r, 1 <= r <= d (``ValueError`` else); ``dropout`` in [0, 1);
    ``act_fn`` a name of Transformers' ``ACT2FN``; ``init_weights`` "random", pyreft's start, or "identity", where the edit
    changes nothing (``ValueError`` for one that cannot: ConsReFT, LoReFT and NoReFT with an activation, and DiReFT and
    NodiReFT with one that is not 0 at 0). ``subspace_partition`` is pyvene's: groups of rows, two numbers being the first of
    them and the one after the last. Unknown keywords are ignored, as pyreft's callers expect.
    """

    orthonormal = True  # are the rows of R, where there is an R among the parameters, to be kept orthonormal?
    method = ""  # the edit's name in a configuration
    scale = 1.0  # h + scale (edit(h) - h) in place of edit(h); of a run, and saved nowhere
    chosen = True  # do samples say which groups of rows edit them?
    by_rows = False  # has some sample been edited with some of R's rows alone?
    partition: groups.Groups = ()  # the groups of rows that a call's ``subspaces`` count, where there are some

    def __init__(
        self,
        embed_dim: int,
        low_rank_dimension: int,
        *,
        dtype: torch.dtype | None = None,
        dropout: float = 0.0,
        act_fn: str | None = None,
        add_bias: bool = False,
        init_weights: str = "random",
        **others: Any,
    ):
        super().__init__()
        if not 1 <= low_rank_dimension <= embed_dim:
            raise ValueError(
                f"low_rank_dimension is {low_rank_dimension}; it must be between 1 and embed_dim ({embed_dim})"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}; it must be at least 0 and below 1")
        dtype = dtype or torch.float32
        if not dtype.is_floating_point:
            raise ValueError(f"dtype is {dtype}; it must be a floating-point dtype")
        if init_weights not in STARTS:
            raise ValueError(f"init_weights is {init_weights!r}; it must be one of {', '.join(STARTS)}")
        if init_weights == "identity" and not may_be_identity(self.method, act_fn):
            raise ValueError(f"init_weights is 'identity', but {self.method} with act_fn {act_fn!r} edits in any case")
        self.embed_dim, self.r = embed_dim, low_rank_dimension
        self.dropout = dropout  # a number and no module: an edit costs microseconds, as does a module's attribute
        self.act_fn = act_fn
        # An activation with parameters of its own, or one unknown to the kernels, becomes a submodule.
        self.act = None if activations.is_fused(act_fn) else activation_module(str(act_fn))
        self.build(dtype, add_bias)
        self.orthonormal = self.orthonormal and "R" in self._parameters  # from here on: there is one, and it is
        self.reset_parameters()
        if init_weights == "identity":
            self.become_identity()
        _alive.add(self)
        if others.get("subspace_partition") is not None:
            self.partition = groups.of_pyvene(others["subspace_partition"], self.r)
        if "use_fast" in others:
            self.use_fast = others["use_fast"]

    @property
    def use_fast(self) -> bool:
        """pyvene's mark on an intervention that it has taken. Where pyvene is, setting it makes it pyvene's class, too."""
        return False

    @use_fast.setter
    def use_fast(self, value: bool) -> None:
        if host is not None:
            host(self)
            self.use_fast = value

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _alive.add(self)  # deepcopy and unpickling do not call __init__

    def build(self, dtype: torch.dtype, add_bias: bool) -> None:
        """Make the parameters: called once, before :meth:`reset_parameters`."""
        raise TypeError("Intervention is abstract; use one of its subclasses")

    def weights(self) -> Weights:
        """(U, V, P, b, c) of the primitive; None for a term that the method does not have."""
        raise TypeError("Intervention is abstract; use one of its subclasses")

    @property
    def pooled(self) -> bool:
        """Whether the kernels that edit with many adapters at once know it."""
        return self.act is None

    def _matrix(self, dtype: torch.dtype) -> nn.Parameter:
        return nn.Parameter(torch.empty(self.r, self.embed_dim, dtype=dtype))

    def _vector(self, dtype: torch.dtype) -> nn.Parameter:
        return nn.Parameter(torch.empty(self.r, dtype=dtype))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """pyreft's init: R orthogonal, W, b, P and c as ``nn.Linear``; not the identity at the start."""
        bound = self.embed_dim**-0.5  # nn.Linear's: kaiming_uniform with a = sqrt(5)
        for name, parameter in self.named_parameters(recurse=False):
            if name == "R":
                nn.init.orthogonal_(parameter)
            else:
                parameter.uniform_(-bound, bound)

    @torch.no_grad()
    def become_identity(self) -> None:
        """V = P, or 0 where there is no P, and b = c = 0: nothing is changed, and V and b have gradients.

        Exact where V has P's dtype, as it has by default; a narrower V is P rounded.
        """
        _, V, P, b, c = self.weights()
        for vector in (b, c):
            if vector is not None:
                vector.zero_()
        if V is not None:
            V.zero_() if P is None else V.copy_(P)

    def forward(
        self,
        base: Tensor,
        source: Any = None,
        subspaces: Any = None,
        *,
        rows: Tensor | None = None,
        inplace: bool = True,
        unique: bool = False,
        **_: Any,
    ) -> Tensor:
        """The edited base, shape and dtype of ``base``; with ``rows`` (integers, -1 = skip) in place.

        ``inplace=False`` leaves ``base`` alone, which ``torch.compile`` wants; ``unique`` promises that no row is listed
        twice. ``subspaces``: for each sample of ``base`` (B, ..., d) the rows of R, or the groups of ``subspace_partition``,
        that it is edited with; not with ``rows``. ``source`` other than None is a ``ValueError``.
        """
        if source is not None:
            raise ValueError("source is not supported: the edit reads the hidden state that it edits, and no other")
        if subspaces is not None:
            return self._in_subspaces(base, subspaces, rows)
        return self.edit(base, rows, IN_PLACE if inplace else NEW, unique)

    def _in_subspaces(self, base: Tensor, given: Any, rows: Tensor | None) -> Tensor:
        if rows is not None or base.ndim < 2:
            raise ValueError("subspaces has one entry a sample of base (batch, ..., d), all of whose rows are edited")
        choices = subspaces.parse(given)
        choices.check(len(base))
        chosen = choices.rows(self.partition, self.r, f"this {type(self).__name__}", len(base))
        edited = base
        for part, only in subspaces.parts(None, chosen, base[0].numel() // self.embed_dim, base.device):
            edited = self.edit(edited, part, NEW, True, only)
        return base.clone() if edited is base else edited

    def edit(
        self,
        hidden: Tensor,
        rows: Tensor | None,
        where: str,
        unique: bool = True,
        only: Tensor | None = None,
        scale: float = 1.0,
    ) -> Tensor:
        """:func:`fastreft.ops.edit.edit` with these weights, dropout included: what the hooks call, as an edit costs
        microseconds and so does the call of a module. ``only``: the rows of R that edit, int64 (k,); all where None.
        ``scale`` multiplies its own."""
        act_fn = self.act_fn if self.act is None else self.act
        scale = scale * self.scale
        w = self.weights() if scale == 1.0 else self.scaled_weights(scale)
        if only is not None:
            w, self.by_rows = subspaces.restricted(w, only), True
        if self.dropout and self.training:
            return self._dropped(hidden, w, rows, where, act_fn)
        return edit(hidden, w, act_fn, rows, where, unique)

    def scaled_weights(self, scale: float) -> Weights:
        """:meth:`weights` of an edit of this scale: of U alone, whatever the kind, as what it expands is the edit."""
        U, V, P, b, c = self.weights()
        return scale * U, V, P, b, c

    def _dropped(
        self, hidden: Tensor, w: Weights, rows: Tensor | None, where: str, act_fn: activations.ActFn
    ) -> Tensor:
        if rows is None:
            return F.dropout(edit(hidden, w, act_fn), self.dropout)
        inplace = settled(where, hidden) == IN_PLACE
        flat = hidden.view(-1, self.embed_dim) if inplace else hidden.reshape(-1, self.embed_dim).clone()
        rows = rows[(rows >= 0) & (rows < flat.shape[0])].unique()
        flat.index_copy_(0, rows, F.dropout(edit(flat[rows], w, act_fn), self.dropout))
        return hidden if inplace else flat.view(hidden.shape)

    def extra_repr(self) -> str:
        shape = f"embed_dim={self.embed_dim}, low_rank_dimension={self.r}"
        return f"{shape}, act_fn={self.act_fn!r}, dropout={self.dropout}"


class LoreftIntervention(Intervention):
    """LoReFT: h + R^T (act(W h + b) - R h), R R^T = I."""

    method = "loreft"

    def build(self, dtype: torch.dtype, add_bias: bool) -> None:
        self.R = self._matrix(torch.promote_types(dtype, torch.float32))
        self.W, self.b = self._matrix(dtype), self._vector(dtype)

    def weights(self):
        p = self._parameters or self.__dict__  # the second for a replica of DataParallel
        return p["R"], p["W"], p["R"], p["b"], None


class DireftIntervention(LoreftIntervention):
    """pyreft's DiReFT: h + R^T act(W h + b), R R^T = I."""

    method = "direft"

    def weights(self):
        p = self._parameters or self.__dict__  # the second for a replica of DataParallel
        return p["R"], p["W"], None, p["b"], None


class NoreftIntervention(Intervention):
    """NoReFT: h + P^T (act(W h + b) - P h - c); c only with ``add_bias``."""

    method = "noreft"
    orthonormal = False

    def build(self, dtype: torch.dtype, add_bias: bool) -> None:
        self.P, self.W, self.b = self._matrix(dtype), self._matrix(dtype), self._vector(dtype)
        if add_bias:
            self.c = self._vector(dtype)

    def weights(self):
        p = self._parameters or self.__dict__  # the second for a replica of DataParallel
        return p["P"], p["W"], p["P"], p["b"], p.get("c")


class NodireftIntervention(NoreftIntervention):
    """The paper's DiReFT: h + P^T act(W h + b). With ``add_bias`` c is held, as pyreft does, and unused."""

    method = "nodireft"

    def weights(self):
        p = self._parameters or self.__dict__  # the second for a replica of DataParallel
        return p["P"], p["W"], None, p["b"], None


class ConsreftIntervention(Intervention):
    """ConsReFT: h + R^T (b - R h), R R^T = I; b fp32 and started as uniform on [0, 1). No dropout."""

    method = "consreft"

    def build(self, dtype: torch.dtype, add_bias: bool) -> None:
        wide = torch.promote_types(dtype, torch.float32)
        self.R, self.b = self._matrix(wide), self._vector(wide)
        self.dropout = 0.0

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """pyreft's init: R orthogonal, b uniform on [0, 1)."""
        nn.init.orthogonal_(self.R)
        nn.init.uniform_(self.b, 0, 1)  # type: ignore[arg-type]

    def weights(self):
        p = self._parameters or self.__dict__  # the second for a replica of DataParallel
        return p["R"], None, p["R"], p["b"], None


class LobireftIntervention(ConsreftIntervention):
    """LobiReFT: h + R^T b, R R^T = I."""

    method = "lobireft"

    def build(self, dtype: torch.dtype, add_bias: bool) -> None:
        dropout = self.dropout
        super().build(dtype, add_bias)
        self.dropout = dropout  # unlike ConsReFT, pyreft drops here

    def weights(self):
        p = self._parameters or self.__dict__  # the second for a replica of DataParallel
        return p["R"], None, None, p["b"], None


# Those of the paper and of pyreft, by the names that a configuration uses; all others are in kinds/.
_CLASSES = (
    LoreftIntervention,
    NoreftIntervention,
    ConsreftIntervention,
    LobireftIntervention,
    DireftIntervention,
    NodireftIntervention,
)
INTERVENTIONS: dict[str, type[Intervention]] = {made.method: made for made in _CLASSES}


def orthonormal_parameters() -> dict[int, nn.Parameter]:
    """id -> R of every orthonormal intervention alive in this process."""
    Rs = [m._parameters["R"] for m in _alive if m.orthonormal]
    return {id(R): R for R in Rs if R is not None}


def edited_by_rows() -> set[int]:
    """The ids of those of them that some sample was edited with some rows of alone."""
    return {id(m._parameters["R"]) for m in _alive if m.by_rows and m.orthonormal}
