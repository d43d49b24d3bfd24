"""Transformers' ``Trainer`` and our columns of a data set: they are kept, also where the model is within somebody's module,
whose forward then takes them or says that it does not, and a collator that leaves them out of its batches is refused.

Imported when ``transformers.trainer`` has been, and there is a model of ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import wraps
from typing import Any

from transformers.trainer import Trainer

from ..plan.said import OURS
from .loading import layers_of

LEFT_OUT = (
    "{} is a column of the data set, and {} leaves it out of its batches, so that the configuration's positions would be "
    "edited; take a collator that keeps it, as default_data_collator does, or the column away"
)


class Kept:
    """A collator, and ``ValueError`` where its batch lacks what its records have of ours."""

    def __init__(self, inner: Any):
        self.inner = inner

    def __call__(self, records: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        first = records[0] if isinstance(records, Sequence) and records else None
        given = [name for name in OURS if first.get(name) is not None] if isinstance(first, Mapping) else []
        batch = self.inner(records, *args, **kwargs)  # which may take things off the records
        for name in given:
            if isinstance(batch, Mapping) and name not in batch:
                raise ValueError(LEFT_OUT.format(name, getattr(self.inner, "__name__", type(self.inner).__name__)))
        return batch


def _kept(inner: Any) -> Any:
    """A method that drops columns, once ours are among those that stay."""

    @wraps(inner)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.args.remove_unused_columns and _has_reft(self):
            self._set_signature_columns_if_needed()
            self._signature_columns += [name for name in OURS if name not in self._signature_columns]
        return inner(self, *args, **kwargs)

    return method


def _looked_at(inner: Any) -> Any:
    """The method that makes loaders, with the trainer's collator looked at."""

    @wraps(inner)
    def _get_dataloader(self: Any, *args: Any, **kwargs: Any) -> Any:
        own = self.data_collator
        if not _has_reft(self):
            return inner(self, *args, **kwargs)
        self.data_collator = Kept(own)
        try:
            return inner(self, *args, **kwargs)
        finally:
            self.data_collator = own

    return _get_dataloader


def _has_reft(trainer: Any) -> bool:
    return hasattr(trainer.model, "modules") and bool(layers_of(trainer.model))


for _name, _wrap in (
    ("_remove_unused_columns", _kept),
    ("_get_collator_with_removed_columns", _kept),
    ("_get_dataloader", _looked_at),
):
    if hasattr(Trainer, _name):
        setattr(Trainer, _name, _wrap(getattr(Trainer, _name)))
