"""An edit by a formula of anybody's, in torch: autograd finds its gradient, and no kernel is asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..interventions import Intervention

KNOWN = (
    "R is the name of a matrix (r, d) whose rows are kept orthonormal: set orthonormal = True, or give it another name"
)


class TorchIntervention(Intervention):
    """h -> :meth:`formula` (h), of the listed rows; a subclass says what it is, and makes its parameters in :meth:`build`.

    ``self.embed_dim`` is d, ``self.r`` the rank that the configuration gives, which a formula may do without. A parameter
    ``R`` (r, d) of a class with ``orthonormal = True`` has orthonormal rows after every step, and no other may be called so.
    Parameters are fp32 unless ``dtype`` says otherwise, and a row comes in fp32 at least; where they are of another dtype than
    the rows, as of a model that was cast as a whole, the formula has them in the rows'. Dropout is on the whole output.
    It gives a new tensor, edits with all of its rows (no ``subspaces``), and is served by ``adapter_names``, not by vLLM.
    """

    orthonormal = False
    pooled = False
    chosen = False

    def __init__(self, embed_dim: int, low_rank_dimension: int = 1, **settings: Any):
        super().__init__(embed_dim, low_rank_dimension, **settings)
        if "R" in self._parameters and not self.orthonormal:
            raise TypeError(f"{type(self).__name__}: {KNOWN}")

    def formula(self, h: Tensor) -> Tensor:
        """The rows h (n, d) as they are afterwards, (n, d); each row by itself, as others may be any."""
        raise TypeError("TorchIntervention is abstract; a subclass says its formula(h)")

    @torch.no_grad()
    def become_identity(self) -> None:
        """Nothing: ``register_intervention(..., identity=True)`` says that the start changes nothing."""

    def edit(
        self,
        hidden: Tensor,
        rows: Tensor | None,
        where: str,
        unique: bool = True,
        only: Tensor | None = None,
        scale: float = 1.0,
    ) -> Tensor:
        """The edited hidden state (..., d), a new one; ``rows`` int64, -1 = skip, None = all of them."""
        if only is not None:
            raise ValueError(
                f"subspaces are rows of R, of the edits that have one; {self.method or type(self).__name__} edits whole"
            )
        flat, scale = hidden.reshape(-1, self.embed_dim), scale * self.scale
        if rows is None:
            return self._edited(flat, scale).view(hidden.shape)
        rows = rows.reshape(-1)
        skip = (rows < 0) | (rows >= len(flat))
        new = self._edited(flat[rows.masked_fill(skip, 0)], scale)
        spare = F.pad(flat, (0, 0, 0, 1))  # has a row for what is skipped, so that nothing waits for a GPU to count it
        return spare.index_copy(0, rows.masked_fill(skip, len(flat)), new)[:-1].view(hidden.shape)

    def _edited(self, rows: Tensor, scale: float) -> Tensor:
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        alike = _cast(self, wide.dtype) if _differs(self, wide.dtype) else self
        new = alike.formula(wide if scale == 1.0 else wide.clone())  # a formula may work in place
        if not isinstance(new, Tensor) or new.shape != wide.shape:
            given = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
            raise ValueError(
                f"{type(self).__name__}.formula gives {given}; it must be as its rows are, {tuple(wide.shape)}"
            )
        new = new if scale == 1.0 else wide + scale * (new - wide)
        return F.dropout(new, self.dropout, self.training).to(rows.dtype)


def _differs(module: nn.Module, dtype: torch.dtype) -> bool:
    """Has a module a number that is of another dtype, as where it was cast with its model? Asked at each edit."""
    for held in (module._parameters, module._buffers):
        for tensor in held.values():
            if tensor is not None and tensor.dtype is not dtype and tensor.is_floating_point():
                return True
    return any(_differs(child, dtype) for child in module._modules.values() if child is not None)


def _cast(module: Any, dtype: torch.dtype) -> Any:
    """A module like it whose numbers are of a dtype; gradients reach its own. It is another object, as other threads may be
    at the first."""
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    for name in ("_parameters", "_buffers"):
        held = module.__dict__[name]
        twin.__dict__[name] = {
            key: tensor.to(dtype) if tensor is not None and tensor.is_floating_point() else tensor
            for key, tensor in held.items()
        }
    children = module._modules.items()
    twin.__dict__["_modules"] = {key: None if child is None else _cast(child, dtype) for key, child in children}
    return twin
