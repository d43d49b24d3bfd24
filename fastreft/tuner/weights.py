"""The tensors of an adapter's file: what is none of an adapter's, going in or out, is refused or mended, and that is said."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from .. import functional

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OFF = 1e-2  # |R R^T - I| that no rounding to 16 bits makes
FAR = 0.5  # and that no average of weights makes


def _off(R: Tensor) -> float:
    """How far the rows of R are from orthonormal, the largest entry of |R R^T - I|."""
    wide = R.detach().double()
    return float((wide @ wide.mT - torch.eye(len(wide), dtype=wide.dtype, device=wide.device)).abs().max())


def _is_R(key: str) -> bool:
    """Is a key an R's? It may end in the adapter's name."""
    return (
        key.endswith(".R") or ".R." in key.rpartition(".reft.")[2] or key.rpartition(".reft.")[2].split(".")[-1] == "R"
    )


def checked(tensors: dict[str, Tensor], doing: str) -> dict[str, Tensor]:
    """An adapter's tensors, ``doing`` ("loading" or "saving") said; rotations that an average has moved are orthonormal again.

    ``ValueError`` for a dtype that holds no weights, a value that is not finite, and an R whose rows are no rotation's.
    """
    mended = dict(tensors)
    off: list[str] = []
    for key, value in tensors.items():
        if value.dtype not in FLOATS:
            raise ValueError(
                f"{doing} the adapter: {key} is {value.dtype}; it must be float32, bfloat16, float16 or float64"
            )
        if value.is_meta or type(value) not in (Tensor, torch.nn.Parameter):
            continue
        if not bool(value.isfinite().all()):
            raise ValueError(f"{doing} the adapter: {key} holds values that are not finite numbers")
        if not _is_R(key) or value.dim() != 2 or (distance := _off(value)) <= OFF:
            continue
        if distance > FAR:
            raise ValueError(
                f"{doing} the adapter: the rows of {key} are not orthonormal, |R R^T - I| is {distance:.2g}; where that is "
                "meant, give them orthonormal rows with fastreft.functional.retract_ first"
            )
        mended[key] = value.detach().clone()
        functional.retract_([mended[key]])
        off.append(f"{distance:.2g}")
    if off:
        warnings.warn(
            f"{doing} the adapter: {len(off)} rotations R were not orthonormal, |R R^T - I| up to {max(off)}, as averages of "
            "weights are (SWA, EMA), and have been retracted; fastreft.retract_model_ does it in the model",
            stacklevel=3,
        )
    return mended


def refuse_strangers(keys: Iterable[str], own: set[str], embeddings: list[str]) -> None:
    """``ValueError`` for keys of a file that are neither an adapter's, nor of modules saved with it, nor the embeddings'."""
    for key in keys:
        ours = ".reft.reft_" in key or ".modules_to_save." in key or ".trainable_tokens_" in key
        if not ours and key in own and not any(f"{name}." in key for name in embeddings):
            raise ValueError(f"loading the adapter: it holds {key}, which is the base model's own and no adapter's")
