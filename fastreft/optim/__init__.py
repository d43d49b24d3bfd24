"""The optimizer that keeps R orthonormal, the guard that teaches it to any other, and parameters in shards."""

from .adamw import ReftAdamW, attach_retraction, guard_optimizers, param_groups

__all__ = ["ReftAdamW", "attach_retraction", "guard_optimizers", "param_groups"]
