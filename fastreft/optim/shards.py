"""Parameters in shards. FSDP2's (DTensors) train: a retraction needs the whole of an R, which is small, so each rank gathers
it, computes the same step and keeps its own shard. DeepSpeed's ZeRO-1 and 2 step flat parts beside whole parameters, see
``zero.py``. FSDP1's flattened ones and ZeRO-3's have no rows to speak of: refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor


def is_dtensor(t: Tensor) -> bool:
    """Is it a DTensor? By name, as its module takes long to import and is there anyway where one is."""
    return type(t).__name__ == "DTensor"


def refuse_flattened(R: Tensor) -> None:
    """``ValueError`` for an R of which no rank can ask the whole."""
    if getattr(R, "ds_id", None) is not None or R.dim() != 2:
        raise ValueError(
            "an orthonormal R is flattened or held by DeepSpeed's ZeRO-3, so that its rows cannot be kept orthonormal; shard "
            "with FSDP2 (fully_shard) or ZeRO-2, or keep R whole (FSDP1: ignored_states=[R])"
        )


def in_parts(R: Tensor) -> bool:
    """Does DeepSpeed's ZeRO-1 or 2 step this in flat parts?"""
    return hasattr(R, "_hp_mapping")


def set_kept(R: Any) -> None:
    """Somebody keeps this R, which is stepped in parts, orthonormal."""
    R._reft_kept = True


def refuse_parts(Rs: Iterable[Tensor]) -> None:
    """``ValueError`` for an R that is stepped in flat parts, and that nobody keeps orthonormal."""
    if any(in_parts(R) and not hasattr(R, "_reft_kept") for R in Rs):
        raise ValueError(
            "DeepSpeed's ZeRO steps an orthonormal R in flat parts, in which its rows are not kept orthonormal: give Trainer "
            "callbacks=[fastreft.ZeroRetraction()], as fastreft train does"
        )


def whole_of_parts(R: Any) -> Tensor:
    """The fp32 master of an R that is stepped in parts, whole, a tensor of its own. Every process must ask."""
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(R)


def keep_parts(R: Any, full: Tensor) -> None:
    """Write ``full`` into an R that is stepped in parts, and into what this process keeps of its fp32 master."""
    from deepspeed.utils import safe_set_full_fp32_param

    safe_set_full_fp32_param(R, full)
    R.copy_(full)


def local(t: Any) -> Tensor:
    """This rank's shard, the same memory; a plain tensor as it is."""
    return t.to_local() if is_dtensor(t) else t


def whole(t: Any) -> Tensor:
    """All of it, on every rank; a plain tensor as it is. Every rank must ask."""
    return t.detach().full_tensor() if is_dtensor(t) else t


def keep(t: Any, full: Tensor) -> None:
    """Write this rank's shard of ``full`` into t. A plain tensor was changed in place already."""
    if is_dtensor(t):
        from torch.distributed.tensor import distribute_tensor

        # No rank sends: all of them have computed the same.
        t.copy_(distribute_tensor(full, t.device_mesh, t.placements, src_data_rank=None))
