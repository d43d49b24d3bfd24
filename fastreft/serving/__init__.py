"""Serving many adapters on one model: a pool of them on the device, each row of a batch edited by its own."""

from .adapter import Adapter, read
from .pool import AdapterPool

__all__ = ["Adapter", "AdapterPool", "read"]
