"""What lies in examples/ runs: the notebooks' code, cell after cell."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted(path.stem for path in HERE.glob("*.ipynb"))


def cells(name):
    return json.loads((HERE / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]


@pytest.mark.default_start
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs(name, tmp_path, monkeypatch):
    for needed in ("matplotlib", "datasets"):
        pytest.importorskip(needed, reason=f"the notebooks need {needed}")
    import matplotlib

    matplotlib.use("Agg", force=True)
    from matplotlib import pyplot

    monkeypatch.chdir(tmp_path)
    for data in HERE.glob("*.jsonl"):
        shutil.copy(data, tmp_path)
    held = {"__name__": name}
    try:
        for i, cell in enumerate(cells(name)):
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), f"{name}.ipynb, cell {i + 1}", "exec"), held)
        assert all(figure.axes for figure in map(pyplot.figure, pyplot.get_fignums())) and pyplot.get_fignums()
    finally:
        pyplot.close("all")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_has_its_outputs_and_nothing_of_a_machine(name):
    assert (HERE / f"{name}.ipynb").stat().st_size < 200_000
    shown = [each for cell in cells(name) for each in cell.get("outputs", ())]
    assert {each["output_type"] for each in shown} <= {"stream", "display_data", "execute_result"}
    assert any("image/png" in each.get("data", {}) for each in shown)
    assert all(cell["execution_count"] is None for cell in cells(name) if cell["cell_type"] == "code")
    said = "".join(text for each in shown for text in each.get("text", ()))
    assert said and not any(root in said for root in ("/home/", "/tmp/", "/usr/", "site-packages"))
