"""Run notebooks and keep what they show: python tools/run_notebooks.py examples/*.ipynb

Each runs in a folder of its own, with the data files (.jsonl) that lie beside it. What would differ from run to run is left
out: counts, times, and what is written to stderr, such as progress bars, which goes to this command's own. Needs nbclient and
ipykernel.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def run(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        for data in path.parent.glob("*.jsonl"):
            shutil.copy(data, folder)
        NotebookClient(notebook, timeout=600, coalesce_streams=True, resources={"metadata": {"path": folder}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.execution_count = None
            sys.stderr.writelines(each.text for each in cell.outputs if each.get("name") == "stderr")
            cell.outputs = [each for each in cell.outputs if each.get("name") != "stderr"]
            for each in cell.outputs:
                if "execution_count" in each:
                    each.execution_count = None
    notebook.metadata.language_info = {"name": "python"}
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        run(Path(name))
