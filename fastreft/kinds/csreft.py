"""CS-ReFT: several subspaces, and a router that says how much each edits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.groups import Groups
from .formula import TorchIntervention

HIDDEN = 16  # of the router


class CsreftIntervention(TorchIntervention):
    """h + sum over groups i of g_i(h) R_i^T (W_i h + b_i - R_i h), with R R^T = I and R_i, W_i, b_i the rows of a group.

    g = sigmoid(G relu(F h / |h| + f) + e), F (16, d), G (groups, 16): a gate a group. ``groups``: those of a configuration's
    ``subspaces``, two halves of R where it names none. The identity: W = R, b = 0.

    Source: CS-ReFT (Zhou 2025, arXiv 2503.10617). There the subspaces are orthonormal each by itself, here all of
    them together; and there the router reads the embedding of a prompt's first token, which as a rule is the same for every
    prompt, here the very state that is edited.
    """

    method = "csreft"
    orthonormal = True
    group_of: Tensor

    def __init__(self, embed_dim: int, low_rank_dimension: int = 8, *, groups: Groups = (), **settings: Any):
        r = low_rank_dimension
        halves = (range((r + 1) // 2), range((r + 1) // 2, r))
        self.routed = [list(rows) for _, rows in groups] or [list(rows) for rows in halves if rows]
        super().__init__(embed_dim, r, **settings)
        group_of = [
            next((i for i, rows in enumerate(self.routed) if row in rows), len(self.routed)) for row in range(r)
        ]
        self.register_buffer("group_of", torch.tensor(group_of), persistent=False)

    def build(self, dtype: torch.dtype, add_bias: bool) -> None:
        self.R = self._matrix(torch.promote_types(dtype, torch.float32))
        self.W, self.b = self._matrix(dtype), self._vector(dtype)
        self.F = nn.Parameter(torch.empty(HIDDEN, self.embed_dim, dtype=dtype))
        self.f = nn.Parameter(torch.empty(HIDDEN, dtype=dtype))
        self.G = nn.Parameter(torch.empty(len(self.routed), HIDDEN, dtype=dtype))
        self.e = nn.Parameter(torch.empty(len(self.routed), dtype=dtype))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """R orthogonal, W and b as ``nn.Linear``; a router whose gates are near a half and tell states apart."""
        super().reset_parameters()
        nn.init.normal_(self.F)  # of a state of length 1 these are numbers of about 1
        nn.init.normal_(self.G, std=HIDDEN**-0.5)
        self.f.zero_()
        self.e.zero_()

    @torch.no_grad()
    def become_identity(self) -> None:
        """W = R and b = 0, whatever the gates."""
        self.W.copy_(self.R)
        self.b.zero_()

    def gates(self, h: Tensor) -> Tensor:
        """How much each group edits rows (n, d), (n, groups)."""
        hidden = torch.relu(h / h.norm(dim=-1, keepdim=True).clamp_min(1e-12) @ self.F.T + self.f)
        return torch.sigmoid(hidden @ self.G.T + self.e)

    def formula(self, h: Tensor) -> Tensor:
        gates = F.pad(self.gates(h), (0, 1))[:, self.group_of]  # a row of no group edits nothing
        return h + (gates * (h @ (self.W - self.R).T + self.b)) @ self.R
