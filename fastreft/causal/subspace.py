"""A subspace of a hidden state that stands for a model's variables: R's rows, a range of them a variable, and their mask.

Kinds, and what pyvene calls them:

    "das"        all of a variable's rows              RotatedSpaceIntervention (r = d), LowRankRotatedSpaceIntervention
    "boundless"  a learnt number of them, by sigmoid((boundary k - i - 1/2) / T) of the i-th of k (Wu et al. 2023, arXiv
                 2305.08809), T annealed               BoundlessRotatedSpaceIntervention
    "mask"       learnt ones, by sigmoid(m / T) with an L1 loss            SigmoidMaskRotatedSpaceIntervention

Out of training a mask is 0 or 1. R is trained, or given: :meth:`Subspace.of` directions, :meth:`Subspace.pca`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from .. import functional
from ..files import staged
from ..interventions import Intervention
from ..ops.edit import IN_PLACE, interchange

KINDS = ("das", "boundless", "mask")
Dims = int | Mapping[str, int]
DEPENDENT = 1e-6  # what is left of a direction of length 1 that the others span, in what fp32 can tell


class Subspace(Intervention):
    """R (r, d) with orthonormal rows, trained by :class:`fastreft.ReftAdamW`. ``dims``: r, or how many of R's rows each
    variable has, in order. ``kind``: see above. ``ValueError`` for sizes that do not fit and a kind that there is not."""

    def __init__(self, embed_dim: int, dims: Dims, kind: str = "das"):
        counts = {"": dims} if not isinstance(dims, Mapping) else dict(dims)
        if kind not in KINDS:
            raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}")
        if not counts or any(isinstance(k, bool) or not isinstance(k, int) or k < 1 for k in counts.values()):
            raise ValueError(f"dims is {dims!r}; it must be a positive integer, or such a number for each variable")
        self.kind, self.temperature = kind, 1.0
        self.variables: dict[str, tuple[int, int]] = {}
        end = 0
        for name, count in counts.items():
            self.variables[name] = end, end + count
            end += count
        super().__init__(embed_dim=embed_dim, low_rank_dimension=end)

    def build(self, dtype: torch.dtype, add_bias: bool) -> None:
        self.R = self._matrix(dtype)
        if self.kind == "boundless":
            self.boundary = nn.Parameter(torch.empty(len(self.variables)))
        if self.kind == "mask":
            self.logits = self._vector(dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """R orthogonal, a boundary of one half, masks of one half."""
        nn.init.orthogonal_(self.R)
        if self.kind == "boundless":
            self.boundary.fill_(0.5)
        if self.kind == "mask":
            self.logits.zero_()

    @classmethod
    def of(cls, directions: Tensor, dims: Dims | None = None, kind: str = "das") -> Subspace:
        """Of given directions (r, d), made orthonormal and not trained; ``dims`` as above. ``ValueError`` where one is 0 or
        a sum of those before it, to :data:`DEPENDENT` of its length."""
        if directions.ndim != 2 or len(directions) > directions.shape[1]:
            raise ValueError(f"directions is {tuple(directions.shape)}; it must be (r, d) with r <= d")
        made = cls(directions.shape[1], len(directions) if dims is None else dims, kind)
        if made.r != len(directions):
            raise ValueError(f"dims is {dims!r}; there are {len(directions)} directions")
        _check_independent(directions.detach())
        R = directions.detach().to(made.R.dtype, copy=True)
        functional.retract_([R])
        made.R = nn.Parameter(R, requires_grad=False)
        return made.to(directions.device)

    @classmethod
    def pca(cls, values: Tensor, dims: Dims, kind: str = "das") -> Subspace:
        """Of the directions along which ``values`` (..., d) vary most, the first first; not trained. ``ValueError`` where
        they vary along fewer."""
        r = sum(dims.values()) if isinstance(dims, Mapping) else dims
        flat = values.detach().reshape(-1, values.shape[-1]).double()
        if not bool(flat.isfinite().all()):
            raise ValueError("values holds a value that is not finite")
        _, lengths, directions = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
        nothing = max(flat.shape) * torch.finfo(flat.dtype).eps * flat.norm()  # what rounding leaves
        many = int((lengths > nothing).sum())
        if r > many:
            raise ValueError(f"dims is {dims!r}; {len(flat)} values have {many} principal directions")
        return cls.of(directions[:r], dims, kind)

    def forward(  # type: ignore[override]
        self,
        base: Tensor,
        source: Any = None,
        subspaces: Any = None,
        *,
        rows: Tensor | None = None,
        where: str = IN_PLACE,
        **_: Any,
    ) -> Tensor:
        """``base`` (..., d) with the coordinates of ``source``, alike, in the rows of a variable, ``subspaces``; in all by
        default.

        With ``rows`` those of base.reshape(-1, d) alone, source (n, d), in place:
        :func:`fastreft.functional.interchange_rows_`.
        """
        if source is None:
            raise ValueError("source is missing; it must be hidden states of the shape of base")
        if subspaces and subspaces not in self.variables:
            raise ValueError(f"variable is {subspaces!r}; this subspace has {', '.join(map(repr, self.variables))}")
        first, last = self.variables[subspaces] if subspaces else (0, self.r)
        R = self.R if last - first == self.r else self.R[first:last]
        mask = self.mask()
        return interchange(base, source, R, None if mask is None else mask[first:last], rows, where)

    def mask(self) -> Tensor | None:
        """How far each of R's rows is exchanged, (r,) from 0 to 1; None where all are."""
        if self.kind == "das":
            return None
        if self.kind == "mask":
            return (
                torch.sigmoid(self.logits / self.temperature) if self.training else (self.logits > 0).to(self.R.dtype)
            )
        parts = []
        for boundary, (first, last) in zip(self.boundary, self.variables.values(), strict=True):
            to_boundary = (
                boundary.clamp(1e-3, 1) * (last - first) - torch.arange(last - first, device=self.R.device) - 0.5
            )
            parts.append(torch.sigmoid(to_boundary / self.temperature) if self.training else (to_boundary > 0).float())
        return torch.cat(parts)

    def penalty(self) -> Tensor | float:
        """What a mask adds to the loss, before its weight: the sum of boundaries, or of masks."""
        if self.kind == "das":
            return 0.0
        return (
            self.boundary.clamp(1e-3, 1).sum()
            if self.kind == "boundless"
            else torch.sigmoid(self.logits / self.temperature).sum()
        )

    def save(self, path: str | os.PathLike, about: Mapping[str, Any] | None = None) -> None:
        """Into a file of safetensors, with ``about`` (what JSON can hold) beside; read by :func:`load`."""
        path = Path(path)
        said = {
            "fastreft": "subspace",
            "kind": self.kind,
            "dims": json.dumps({name: last - first for name, (first, last) in self.variables.items()}),
            "trained": json.dumps(self.R.requires_grad),
            "about": json.dumps(dict(about or {})),
        }
        with staged(path.parent, last=path.name) as staging:
            save_file(
                {name: p.detach().contiguous().cpu() for name, p in self.named_parameters()}, staging / path.name, said
            )


def check_variables(names: Collection[str], subspace: Subspace | None, who: str) -> None:
    """``ValueError`` where ``who`` ("pairs have") has no sources, or one for a variable that the subspace has not."""
    if not names:
        raise ValueError(f"{who} no sources; there must be one, or one a variable")
    variables = {} if subspace is None else subspace.variables
    if not set(names) <= {*variables, ""}:
        known = ", ".join(variables) or "not named"
        said = "there is no subspace" if subspace is None else f"the subspace's variables are {known}"
        raise ValueError(f"{who} sources for {', '.join(map(str, names))}; {said}")


def _check_independent(directions: Tensor) -> None:
    """``ValueError`` for a direction that is not finite, or that adds nothing to those before it: |r_ii| of a QR of directions
    of length 1 is what is left of each beside them."""
    of_one = F.normalize(directions.double(), dim=1)
    if not bool(of_one.isfinite().all()):
        raise ValueError("directions holds a value that is not finite")
    left = torch.linalg.qr(of_one.T, mode="r").R.diagonal().abs()
    if bool((left < DEPENDENT).any()):
        row = int((left < DEPENDENT).int().argmax())
        raise ValueError(f"directions[{row}] is 0, or a sum of those before it; directions must be independent")


def load(path: str | os.PathLike) -> tuple[Subspace, dict[str, Any]]:
    """A saved subspace, and what was said about it. ``ValueError`` for a file that is none or holds what does not fit."""
    try:
        with safe_open(path, framework="pt") as file:
            said = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
    except (OSError, SafetensorError) as error:
        raise ValueError(f"'{path}' is not a file of safetensors: {error}") from None
    if said.get("fastreft") != "subspace" or "R" not in tensors or tensors["R"].ndim != 2:
        raise ValueError(f"'{path}' holds no subspace")
    try:
        made = Subspace(tensors["R"].shape[1], json.loads(said["dims"]), said["kind"])
        made.load_state_dict(tensors)
        made.R.requires_grad_(json.loads(said["trained"]) is True)
        about = json.loads(said["about"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"'{path}' holds a subspace that does not fit together: {' '.join(str(error).split())}"
        ) from None
    if not all(bool(p.isfinite().all()) for p in made.parameters()):
        raise ValueError(f"'{path}' holds a value that is not finite")
    return made.eval(), about
