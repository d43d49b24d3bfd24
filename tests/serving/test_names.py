"""Which adapter a request names, by its model or by its argument; without vLLM."""

import shutil

import pytest

from fastreft.serving.vllm.names import Names, named, strength
from fastreft.serving.vllm.shelf import Shelf


@pytest.fixture
def names(tmp_path):
    for name in ("one", "two", "wide"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
    shelf = Shelf(tmp_path, layers=1, width=8, most_r=8)
    return Names({"lora": "a LoRA"}, shelf, {"base", "wide"}, lambda name, at: (name, at))


def test_the_names_are_the_loras_and_behind_them_the_adapters(names, tmp_path):
    assert [name in names for name in ("lora", "one", "two")] == [True] * 3
    assert [name in names for name in ("nobody", "", None, "../shelf", "wide", "base")] == [False] * 6
    assert names["lora"] == "a LoRA" and names["one"] == ("one", str(tmp_path / "one"))
    assert names.served() == ["one", "two"] and list(names) == ["lora"]  # "wide" is a base model's name
    assert names.adapter("one") == "one" and names.adapter("lora") is None
    shutil.copytree(tmp_path / "one", tmp_path / "lora")
    shutil.copytree(tmp_path / "one", tmp_path / "new")
    assert names["lora"] == "a LoRA" and names.served() == ["new", "one", "two"]
    shutil.rmtree(tmp_path / "one")
    assert "one" not in names


@pytest.mark.parametrize(
    ("extra", "model", "found"),
    [({}, None, None), ({}, "one", "one"), ({"reft": "one"}, None, "one"), ({"reft": "one"}, "one", "one"),
     ({"other": 1}, None, None), ({"reft": 3}, None, 3)],
)  # fmt: skip
def test_what_a_request_names(extra, model, found):
    assert named(extra, model) == found


def test_how_strong():
    assert [strength(extra, "one") for extra in ({}, {"reft_scale": -1}, {"reft_scale": 0.5})] == [1.0, -1.0, 0.5]
    for asked in (True, "1", None, float("nan"), float("inf"), -1e9, 1001, [1]):
        with pytest.raises(ValueError, match=r"'reft_scale' is .*; it must be a number from -1000 to 1000"):
            strength({"reft_scale": asked}, "one")
    with pytest.raises(ValueError, match=r"'reft_scale' is 2, and the request names no adapter"):
        strength({"reft_scale": 2}, None)


@pytest.mark.parametrize(
    ("extra", "model", "said"),
    [
        ({"reft": "two"}, "one", "the model is the adapter 'one', and 'reft' names 'two'"),
        ({"reft_strength": -1}, None, "there is no argument 'reft_strength'"),
        ({"REFT": "one"}, "one", "there is no argument 'REFT'"),
        ({"reft": None}, None, "'reft' is null"),
        ({"reft": "a" * 1000}, "one", r"'reft' names 'a{76}\.\.\.; give one of them"),
    ],
)
def test_what_is_no_name(extra, model, said):
    with pytest.raises(ValueError, match=said):
        named(extra, model)
