"""One direction in a layer's hidden states: what it says of texts, and the adapter that adds it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..files import staged
from ..tuner.steered import finite
from .added import with_vectors
from .given import Text, check_vector
from .states import states


@dataclass
class Direction:
    """``vector`` w (d,), of unit length, in the states behind ``layer``; a token's latent is w h + ``bias``.

    ``first``: so many tokens of a text are left out, its BOS, or what a chat template begins with; ``largest``: the largest
    latent of the texts that it was made of, in which units of strength are counted (AxBench's max_act); ``method``: how it
    was found.
    """

    vector: Tensor
    layer: int
    bias: float = 0.0
    first: int = 1
    largest: float = 1.0
    method: str = ""

    def __post_init__(self) -> None:
        self.vector = self.vector.detach().float().cpu()
        length = float(self.vector.norm()) if self.vector.ndim == 1 else float("nan")
        if not 0 < length < float("inf"):
            raise ValueError(
                f"vector is {tuple(self.vector.shape)} of length {length}; it must be (d,), finite and not 0"
            )
        self.vector /= length

    def latents(self, model: nn.Module, texts: Sequence[Text], *, batch_size: int = 16) -> list[Tensor]:
        """w h + bias of each text's tokens but the ``first``, (n,). ``ValueError`` where the model has another width."""
        check_vector(model, self.layer, self.vector)
        found = states(model, self.layer, texts, batch_size=batch_size, first=self.first)
        return [rows @ self.vector.to(rows.device) + self.bias for rows in found]

    def scores(self, model: nn.Module, texts: Sequence[Text], *, batch_size: int = 16) -> Tensor:
        """Each text's largest latent, (texts,); -inf where it has no token but those left out."""
        found = self.latents(model, texts, batch_size=batch_size)
        return torch.tensor([float(each.max()) if len(each) else float("-inf") for each in found])

    def adapter(
        self, model: nn.Module, strength: float = 1.0, *, positions: str = "all", adapter_name: str = "default"
    ) -> PeftModel:
        """``model`` with an adapter that adds ``strength`` x ``largest`` x w to the states of these tokens: a ``bias``, to be
        steered, saved, mixed and served as any other, active beside the adapters that are. ``ValueError``, and the model as it
        was, for a strength that is no finite number, a layer or a width that the model has not, and a name that is taken."""
        strength = finite(strength, f"strength is {strength!r}; it must be a finite number")
        vector = strength * self.largest * self.vector
        return with_vectors(model, {self.layer: vector}, positions, adapter_name)

    def save(self, path: str | os.PathLike) -> None:
        """Into a file of safetensors, which :meth:`load` reads."""
        path = Path(path)
        said = {
            "fastreft": "direction",
            "layer": str(self.layer),
            "bias": repr(self.bias),
            "first": str(self.first),
            "largest": repr(self.largest),
            "method": self.method,
        }
        with staged(path.parent, last=path.name) as staging:
            save_file({"vector": self.vector}, staging / path.name, said)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Direction:
        """What :meth:`save` wrote; ``ValueError`` for a file that is none."""
        try:
            with safe_open(path, framework="pt") as file:
                said = file.metadata() or {}
                if said.get("fastreft") != "direction":
                    raise ValueError(f"'{path}' holds no direction")
                return cls(
                    file.get_tensor("vector"),
                    int(said["layer"]),
                    float(said["bias"]),
                    int(said["first"]),
                    float(said["largest"]),
                    said["method"],
                )
        except (OSError, SafetensorError, KeyError) as error:
            raise ValueError(f"'{path}' is no file of a direction: {error}") from None


def auroc(with_it: Tensor | Sequence[float], without: Tensor | Sequence[float]) -> float:
    """The area under the ROC curve: how often a text with the concept scores above one without, ties counting half.
    ``ValueError`` without a score on a side, and for one that is NaN."""
    a, b = (torch.as_tensor(scores, dtype=torch.float64) for scores in (with_it, without))
    if not a.numel() or not b.numel():
        raise ValueError(
            f"there are {a.numel()} scores with the concept and {b.numel()} without; each must have one at least"
        )
    for name, scores in (("with_it", a), ("without", b)):
        if bool(scores.isnan().any()):
            raise ValueError(f"{name} holds a score that is NaN; each must be a number that can be compared")
    above = (a[:, None] > b).double() + 0.5 * (a[:, None] == b).double()
    return float(above.mean())
