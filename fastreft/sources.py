"""Another library's source, read and not run: Transformers takes seconds to import, and a command line asks for names."""

from __future__ import annotations

import ast
import importlib.util
from functools import lru_cache
from pathlib import Path


@lru_cache
def tree_of(package: str, path: str) -> ast.Module:
    """The syntax tree of a file of an installed package; ``ImportError`` where there is no such source."""
    found = importlib.util.find_spec(package)
    for folder in (found.submodule_search_locations if found else None) or ():
        file = Path(folder, path)
        if file.is_file():
            return ast.parse(file.read_text(encoding="utf-8"))
    raise ImportError(f"{package} is not installed, or without the source of {path}")


def assigned(tree: ast.Module, name: str) -> ast.expr | None:
    """What a module assigns to a name, or None."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            return node.value
    return None
