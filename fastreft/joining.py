"""What of ours has to be there where another library is, whichever of the two is imported first: ``join``.

PEFT must know the method before it can load an adapter of it, and importing PEFT takes seconds: so importing fastreft does
not, and PEFT's own import brings the tuner with it.
"""

from __future__ import annotations

import importlib
import importlib.abc
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def join(library: str, ours: str) -> None:
    """Import the module ``ours`` once ``library`` is imported; now, where it is already."""
    if library in sys.modules:
        _bring(library, ours)
    else:
        sys.meta_path.insert(0, _Finder(library, ours))


def _bring(library: str, ours: str) -> None:
    """A library is nobody's to break: what goes wrong with ours is a warning, and an error where ours is used."""
    try:
        importlib.import_module(ours)
    except Exception as error:
        warnings.warn(f"fastreft does not work with this {library}: {type(error).__name__}: {error}", stacklevel=2)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one library, as whoever else finds it does, with a loader that has ours follow; then it is gone."""

    def __init__(self, library: str, ours: str):
        self.library, self.ours = library, ours

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.library:
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec = None if find is None else find(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    """Another loader, after whose work ours is imported. What it has beside that, it still has."""

    def __init__(self, inner: Any, finder: _Finder):
        self.inner, self.finder = inner, finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self.inner
        module.__loader__ = self.inner
        self.inner.exec_module(module)
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
            _bring(self.finder.library, self.finder.ours)
