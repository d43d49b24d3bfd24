"""Hierarchical equality: is (W = X) = (Y = Z)? Four vectors of four numbers, a network of three layers that learns it, and the
causal model whose variables WX and YZ are looked for in it.

The network, its data and its training are those of pyvene's tutorial (DAS_Main_Introduction.ipynb), after Geiger et al. 2023
(arXiv 2303.02536), section 4.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .causal_model import CausalModel, Setting

SIZE = 4  # of a vector
VARIABLES = (["WX"], ["YZ"], ["WX", "YZ"])  # what is exchanged, a third of the pairs each


def causal_model() -> CausalModel:
    """Its inputs: all different, both pairs alike, the first, or the last, a quarter each."""

    def sample(n: int, generator: np.random.Generator) -> Setting:
        w, x, y, z = (np.round(generator.uniform(-1, 1, (n, SIZE)), 2) for _ in range(4))
        kind = generator.integers(4, size=n)[:, None]
        return {
            "W": w,
            "X": np.where((kind == 1) | (kind == 2), w, x),
            "Y": y,
            "Z": np.where((kind == 1) | (kind == 3), y, z),
        }

    def same(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a == b).all(-1)

    parents = {"W": [], "X": [], "Y": [], "Z": [], "WX": ["W", "X"], "YZ": ["Y", "Z"], "O": ["WX", "YZ"]}
    return CausalModel(parents, {"WX": same, "YZ": same, "O": lambda a, b: a == b}, sample=sample)


def encode(setting: Setting) -> Tensor:
    """The vectors of each example one after the other, (n, 16)."""
    return torch.from_numpy(np.concatenate([setting[name] for name in "WXYZ"], -1)).float()


class Network(nn.Module):
    """Three layers of 16 with ReLU, and a score for no and yes."""

    def __init__(self) -> None:
        super().__init__()
        self.h = nn.ModuleList(nn.Sequential(nn.Linear(4 * SIZE, 4 * SIZE), nn.ReLU()) for _ in range(3))
        self.score = nn.Linear(4 * SIZE, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.h:
            x = layer(x)
        return self.score(x)


def trained(
    causal: CausalModel, seed: int = 42, examples: int = 1 << 20, epochs: int = 3, batch: int = 1024
) -> Network:
    """A network that has learnt the task, at a rate of 1e-3 that falls to 0; its start and the order are the seed's."""
    torch.manual_seed(seed)
    network = Network()
    setting = causal.sample(examples, 0)
    x, y = encode(setting), torch.from_numpy(causal.run(setting)["O"]).long()
    total = epochs * (examples // batch)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)
    for _ in range(epochs):
        for chosen in torch.randperm(examples)[: examples // batch * batch].view(-1, batch):
            optimizer.zero_grad()
            F.cross_entropy(network(x[chosen]), y[chosen]).backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def accuracy(network: nn.Module, causal: CausalModel, n: int = 10000, seed: int = 7) -> float:
    """Of the network, on examples of another seed."""
    setting = causal.sample(n, seed)
    with torch.no_grad():
        answered = network(encode(setting)).argmax(1).numpy()
    return float((answered == causal.run(setting)["O"]).mean())
