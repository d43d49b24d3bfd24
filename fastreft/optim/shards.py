"""Parameters in shards. FSDP2's (DTensors) train: a retraction needs the whole of an R, which is small, so each rank gathers
it, computes the same step and keeps its own shard. FSDP1's flattened ones and DeepSpeed's have no rows to speak of: refused.
"""

from __future__ import annotations

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
