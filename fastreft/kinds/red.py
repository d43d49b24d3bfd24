"""RED: every coordinate of a hidden state scaled and shifted."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .formula import TorchIntervention


class RedIntervention(TorchIntervention):
    """s * h + v, s and v (d,), by coordinates; ``low_rank_dimension`` means nothing to it. It starts at s = 1, v = 0.

    Source: RED (Wu et al. 2024, arXiv 2402.15179), there of the feed-forward's output at every token
    (``component="mlp_output"``, ``positions="all"``).
    """

    method = "red"

    def build(self, dtype: torch.dtype, add_bias: bool) -> None:
        self.s = nn.Parameter(torch.empty(self.embed_dim, dtype=dtype))
        self.v = nn.Parameter(torch.empty(self.embed_dim, dtype=dtype))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """s = 1, v = 0: nothing is changed."""
        self.s.fill_(1)
        self.v.zero_()

    def formula(self, h: Tensor) -> Tensor:
        return torch.addcmul(self.v, h, self.s)
