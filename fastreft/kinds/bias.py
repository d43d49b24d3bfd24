"""One vector a layer that is added: what steering vectors are, and what BitFit trains of a block's output."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..interventions import Intervention
from ..ops.checks import Weights


class BiasIntervention(Intervention):
    """h + v, v (d,); ``low_rank_dimension`` means nothing to it. It starts at v = 0.

    As an edit of the kernels it is h + U^T b with U = v (1, d) and b = 1. ``of`` makes one of a given vector.
    Source: BitFit (Ben Zaken et al. 2022, arXiv 2106.10199), of a hidden state; steering vectors.
    """

    method = "bias"
    orthonormal = False

    def __init__(self, embed_dim: int, low_rank_dimension: int = 1, **settings: Any):
        super().__init__(embed_dim, 1, **settings)

    def build(self, dtype: torch.dtype, add_bias: bool) -> None:
        self.v = nn.Parameter(torch.empty(self.embed_dim, dtype=dtype))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """v = 0."""
        self.v.zero_()

    def become_identity(self) -> None:
        """Nothing more: it starts so."""

    def weights(self) -> Weights:
        p: Any = self._parameters or self.__dict__  # the second for a replica of DataParallel
        return p["v"][None], None, None, p["v"].new_ones(1), None
