"""An edit by a formula of anybody's, in torch: autograd finds its gradient, and no kernel is asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..interventions import Intervention

KNOWN = (
    "R is the name of a matrix (r, d) whose rows are kept orthonormal: set orthonormal = True, or give it another name"
)


class TorchIntervention(Intervention):
    """h -> :meth:`formula` (h), of the listed rows; a subclass says what it is, and makes its parameters in :meth:`build`.

    ``self.embed_dim`` is d, ``self.r`` the rank that the configuration gives, which a formula may do without. A parameter
    ``R`` (r, d) of a class with ``orthonormal = True`` has orthonormal rows after every step, and no other may be called so.
    Parameters are fp32 unless ``dtype`` says otherwise, and a row comes in fp32 at least. Dropout is on the whole output.
    It gives a new tensor, edits with all of its rows (no ``subspaces``), and is served by ``adapter_names``, not by vLLM.
    """

    orthonormal = False
    pooled = False
    chosen = False

    def __init__(self, embed_dim: int, low_rank_dimension: int = 1, **settings: Any):
        super().__init__(embed_dim, low_rank_dimension, **settings)
        if self.orthonormal is not ("R" in self._parameters):
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
        new = self.formula(wide)
        if new.shape != wide.shape:
            raise ValueError(
                f"{type(self).__name__}.formula gives {tuple(new.shape)}; it must be as its rows are, {tuple(wide.shape)}"
            )
        new = new if scale == 1.0 else wide + scale * (new - wide)
        return F.dropout(new, self.dropout, self.training).to(rows.dtype)
