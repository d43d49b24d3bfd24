"""The tensors of an adapter's file: what is none of an adapter's, going in or out, is refused or mended, and that is said."""

from __future__ import annotations

import warnings
from collections.abc import Container, Iterable

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


def checked(tensors: dict[str, Tensor], doing: str, *, orthonormal: bool = True) -> dict[str, Tensor]:
    """An adapter's tensors, ``doing`` ("loading" or "saving") said; rotations that an average has moved are orthonormal again.
    ``orthonormal``: is an R one? That of an edit of a user's need not be.

    ``ValueError`` for a dtype that holds no weights, a value that is not finite, and an R whose rows are no rotation's.
    """
    mended = dict(tensors)
    off: list[str] = []
    for key, value in tensors.items():
        refuse_dtypes({key: value.dtype}, doing)
        if value.is_meta or type(value) not in (Tensor, torch.nn.Parameter):
            continue
        refuse_unfinite(key, value, doing)
        if not orthonormal or not _is_R(key) or value.dim() != 2 or (distance := _off(value)) <= OFF:
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


def refuse_dtypes(dtypes: dict[str, torch.dtype], doing: str = "loading") -> None:
    """``ValueError`` for a dtype that holds no weights."""
    for key, dtype in dtypes.items():
        if dtype not in FLOATS:
            raise ValueError(f"{doing} the adapter: {key} is {dtype}; it must be float32, bfloat16, float16 or float64")


def refuse_unfinite(key: str, value: Tensor, doing: str) -> None:
    """``ValueError`` for a tensor with values that are not finite."""
    if not bool(value.isfinite().all()):
        raise ValueError(f"{doing} the adapter: {key} holds values that are not finite numbers")


def refuse_strangers(
    keys: Iterable[str], adapter_name: str, own: Container[str], embeddings: list[str]
) -> dict[str, str]:
    """``ValueError`` for keys of a file that are neither an adapter's, nor of modules saved with it, nor the embeddings', and
    for those that the model has no place for. The embeddings' keys, and what the model calls them."""
    tables = {}
    for key in keys:
        bare = key.removeprefix("base_model.model.")
        if key not in own and bare not in own:
            raise ValueError(f"loading the adapter: it holds {key}, which the model has no place for")
        if f".reft_edit.{adapter_name}." in key or f".reft_suffix.{adapter_name}." in key:
            continue
        whole = ".modules_to_save." in key or ".trainable_tokens_" in key
        if whole and f".{adapter_name}." in f"{key}.":
            continue
        if whole or not any(bare.startswith(f"{name}.") for name in embeddings):
            raise ValueError(f"loading the adapter: it holds {key}, which is the base model's own and no adapter's")
        tables[key] = key if key in own else bare
    return tables
