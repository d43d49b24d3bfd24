"""What people are given to run does: the notebooks and scripts of examples/, the code of docs/recipes.md."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import DataCollatorForSeq2Seq, TrainingArguments

from fastreft.tasks.behaviour import examples
from fastreft.tasks.data import encode
from fastreft.tasks.models import load_base, load_tokenizer

HERE = Path(__file__).parents[1] / "examples"
RECIPES = HERE.parent / "docs" / "recipes.md"
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


@pytest.mark.default_start
def test_lora_then_reft(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    tokenizer = load_tokenizer("embedded")
    train, test = examples(0, 4)
    data = [encode(tokenizer, each.prompt, each.completion) for each in train[:64]]
    prompts = [each.prompt for each in test]

    def arguments(**settings):
        quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "log_level": "error"}
        return TrainingArguments("runs", max_steps=6, per_device_train_batch_size=8, seed=0, **quiet, **settings)

    held = {
        "base_model": lambda: load_base("embedded"),
        "arguments": arguments,
        "data": data,
        "collator": DataCollatorForSeq2Seq(tokenizer),
        "batch": tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt"),
    }
    beside, merged = re.findall(r"```python\n(.*?)```", RECIPES.read_text(encoding="utf-8"), flags=re.DOTALL)
    first, second = beside.split("\nedit = ")
    exec(first, held)
    after_lora = {name: p.clone() for name, p in held["model"].named_parameters() if "lora_" in name}
    exec("edit = " + second, held)
    model, loaded = held["model"], held["loaded"]
    own = dict(model.named_parameters())
    assert after_lora and all(torch.equal(own[name], p) for name, p in after_lora.items())
    assert all(bool(p.any()) for name, p in own.items() if name.endswith(".b"))  # the edits were trained
    assert list(loaded.peft_config) == ["default", "edit"]
    assert torch.equal(held["text"], written(model, held["batch"]))
    exec(merged, held)
    assert torch.equal(written(held["again"], held["batch"]), written(held["merged"], held["batch"]))
    with torch.no_grad(), held["merged"].disable_adapter():
        lora_alone = held["merged"](**held["batch"]).logits
    with torch.no_grad():
        assert not torch.allclose(held["merged"](**held["batch"]).logits, lora_alone, atol=1e-2)


def written(model, batch):
    return model.generate(**batch, max_new_tokens=12, do_sample=False)


@pytest.mark.default_start
@pytest.mark.parametrize("name", ["vision", "audio"])
def test_a_script_runs(name):
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.main()
    assert found["LoReFT"] > found["head alone"] + 0.2
