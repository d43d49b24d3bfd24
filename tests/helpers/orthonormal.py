"""How far the rows of an R are from orthonormal."""

import torch


def error(R: torch.Tensor) -> float:
    R = R.detach().double()
    return float((R @ R.T - torch.eye(len(R), dtype=torch.float64, device=R.device)).abs().max())
