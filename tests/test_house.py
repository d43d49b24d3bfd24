"""Arrows run one way: who may import whom in fastreft/, read from the code. csrc's includes are in ops/test_includes.py."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

import fastreft

FACE = {name for name in fastreft.__all__ if name not in ("functional", "reference")}
ROOT = Path(__file__).resolve().parents[1] / "fastreft"

# From the top down. A room imports itself and what stands below it. __init__ is the package's face, which hands names on.
ORDER = """
    __main__ cli tasks serving __init__ pyreft concepts tuner causal settings optim functional kinds interventions plan models
    ops reference sources files joining
""".split()
# What else a library's name may stand in: the rooms from this one up.
KNOWN_FROM = {
    "peft": "tuner",
    "transformers": "interventions",
    "vllm": "serving",
    "pyvene": "pyreft",
    "datasets": "pyreft",
    "rich": "tasks",
}
# These know the conventions of Transformers' models, and not its code.
LIGHT = ("cli", "settings", "sources", "joining", "plan.spec", "models.components", "ops.names", "ops.groups")


def room_of(module: str) -> str:
    return module.split(".")[0]


def imports_of(module: str, tree: ast.Module, is_package: bool) -> set[str]:
    """What a module of fastreft imports, by whole name; its own package's without the 'fastreft.' before it."""
    found = set()
    inside = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = inside[: len(inside) - node.level + 1] if node.level else []
            base = ["fastreft", *base] if node.level else []
            found |= {".".join([*base, *([node.module] if node.module else []), alias.name]) for alias in node.names}
    return {"__init__" if name == "fastreft" else name.removeprefix("fastreft.") for name in found}


def resolved(names: set[str], files: set[str]) -> set[str]:
    """The modules meant: `from .a import b` takes a.b where that is a module, else a; a name of the face takes the face."""
    cut = {name if name in files else name.rpartition(".")[0] or name for name in names}
    return {"__init__" if name in FACE else name for name in cut}


def house() -> dict[str, set[str]]:
    """Module -> the modules and libraries that it imports, names within a module cut off; its own, to plant something in."""
    return dict(_read())


@functools.cache
def _read() -> dict[str, set[str]]:
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in ROOT.rglob("*.py")
    }
    del files["__init__"]
    return {
        module: resolved(imports_of(module, ast.parse(path.read_text()), path.name == "__init__.py"), {*files})
        for module, path in files.items()
    }


def wrong_arrows(modules: dict[str, set[str]]) -> list[str]:
    """The arrows upwards, the rooms that are nowhere in ORDER, and the libraries known too far down."""
    wrong = [f"{module} is in no room of ORDER" for module in modules if room_of(module) not in ORDER]
    for module, taken in modules.items():
        floor = ORDER.index(room_of(module)) if room_of(module) in ORDER else 0
        for name in taken:
            room = room_of(name)
            if room in ORDER and ORDER.index(room) < floor:
                wrong.append(f"{module} imports {name}, which is above it")
            if room in KNOWN_FROM and floor > ORDER.index(KNOWN_FROM[room]):
                wrong.append(f"{module} imports {name}, which nothing below {KNOWN_FROM[room]} may know")
    return sorted(wrong)


def circle(modules: dict[str, set[str]]) -> list[str]:
    """The modules that import each other in a loop, with all that hangs on it; empty where there is none."""
    left = {module: taken & modules.keys() - {module} for module, taken in modules.items()}
    while ready := [module for module, taken in left.items() if not taken & left.keys()]:
        for module in ready:
            del left[module]
    return sorted(left)


def test_no_arrow_upwards_and_no_circle():
    modules = house()
    assert len(modules) > 60 and "ops.edit" in modules["interventions"]  # the reading reads
    assert wrong_arrows(modules) == []
    assert circle(modules) == []


@pytest.mark.parametrize(
    ("module", "code", "said"),
    [
        ("ops.edit", "from ..tuner.layer import ReftLayer", "ops.edit imports tuner.layer, which is above it"),
        (
            "ops.edit",
            "def late():\n    from fastreft import functional",
            "ops.edit imports functional, which is above it",
        ),
        ("optim.guard", "from fastreft import ReftConfig", "optim.guard imports __init__, which is above it"),
        ("optim.guard", "import fastreft", "optim.guard imports __init__, which is above it"),
        ("reference", "from .ops import native", "reference imports ops.native, which is above it"),
        ("plan.forward", "import peft", "plan.forward imports peft, which nothing below tuner may know"),
        (
            "ops.gemms",
            "from transformers.activations import ACT2FN",
            "ops.gemms imports transformers.activations, which nothing below interventions may know",
        ),
        ("attic.box", "", "attic.box is in no room of ORDER"),
    ],
)
def test_a_planted_arrow_is_found(module, code, said):
    modules = house()
    planted = imports_of(module, ast.parse(code), False)
    modules[module] = modules.get(module, set()) | resolved(planted, {*modules})
    assert wrong_arrows(modules) == [said]


def test_a_planted_circle_is_found():
    modules = house()
    modules["plan.hooks"] = {"plan.forward"}  # which imports it
    assert {"plan.forward", "plan.hooks"} <= set(circle(modules))
    assert wrong_arrows(modules) == []


def test_one_place_chooses_how_an_edit_is_computed():
    """The ways to compute it are ops.edit's alone; ops.step asks csrc/quick/ for the optimizer, ops.prompts for rows."""
    modules = house()
    for way in ("ops.gemms", "ops.autograd"):
        assert [module for module, taken in modules.items() if way in taken] == ["ops.edit"]
    asking = {path.stem for path in ROOT.rglob("*.py") if "quick.edit_rows_(" in path.read_text()}
    assert asking == {"edit"}


@pytest.mark.parametrize("module", LIGHT)
def test_what_must_be_light_imports_the_light(module):
    """No torch, and nothing of ours that has it."""
    modules = house()
    reached, todo = set(), [module]
    while todo:
        name = todo.pop()
        if name not in reached:
            reached.add(name)
            todo += modules.get(name, ())
            todo += [name.rpartition(".")[0]] if "." in name else []  # a room's __init__ runs, too
    assert not reached & {"torch", "peft", "transformers", "numpy", "datasets"}


def test_every_room_says_what_it_is_for():
    for folder in ROOT.iterdir():
        face = folder / "__init__.py"
        if face.exists() and folder.name != "embedded":
            assert ast.get_docstring(ast.parse(face.read_text())), f"{face} says nothing"
