"""The optimizer that keeps R orthonormal (``adamw.py``), the guard that teaches it to any other, and parameters in shards.

May know the interventions and the native step; knows no model and nothing of PEFT.
"""

from .adamw import ReftAdamW, param_groups
from .guard import attach_retraction, guard_optimizers, retract_model_

__all__ = ["ReftAdamW", "attach_retraction", "guard_optimizers", "param_groups", "retract_model_"]
