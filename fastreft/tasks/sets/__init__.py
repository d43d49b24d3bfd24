"""The tasks of the ReFT paper and others: data sets, how they are asked, and how they are scored.

Each module registers its own; :func:`register` adds yours.
"""

from . import arithmetic, commonsense, composition, glue, instructions, labelled, memorisation, tagging  # noqa: F401  # they register what they hold
from .registry import Record, TaskSet, find, names, register, register_family, training_records
from .tagging import tagged

__all__ = ["Record", "TaskSet", "find", "names", "register", "register_family", "tagged", "training_records"]
