"""The shelf of adapters that requests name: found, refused, replaced; without vLLM."""

import shutil

import pytest
import torch
from tiny import LAYERS, WIDTH, make

from fastreft import ReftConfig, get_reft_model
from fastreft.serving.vllm.shelf import Shelf


@pytest.fixture
def folder(tmp_path):
    for i, (name, more) in enumerate({"one": {}, "two": dict(positions="all"), "wide": dict(r=9)}.items()):
        torch.manual_seed(i)
        config = ReftConfig(**{"r": 2, "positions": "f1+l1", "task_type": "CAUSAL_LM", "init_weights": "random"} | more)
        get_reft_model(make("llama"), config).save_pretrained(tmp_path / "shelf" / name)
    return tmp_path / "shelf"


def shelf_of(folder, **more):
    return Shelf(folder, **{"layers": LAYERS, "width": WIDTH, "most_r": 8} | more)


def test_a_name_is_its_content(folder, tmp_path):
    shelf = shelf_of(folder)
    assert shelf.names() == ["one", "two", "wide"]
    one, two = shelf.find("one"), shelf.find("two")
    assert one[0] != two[0] and shelf.find("one") == one and one[1].endswith(one[0])
    shutil.copytree(folder / "one", folder / "again")
    assert shelf.find("again") == one
    shutil.rmtree(folder / "one")
    shutil.copytree(folder / "two", folder / "one")
    assert shelf.find("one") == two
    assert (tmp_path / one[1]).is_dir()  # of a request that came before


@pytest.mark.parametrize("name", ["", "nobody", "../shelf", "one/../two", 3, None])
def test_a_name_that_there_is_not(folder, name):
    with pytest.raises(ValueError, match="there is no adapter"):
        shelf_of(folder).find(name)


def test_what_cannot_be_served_is_said_and_the_rest_go_on(folder):
    shelf = shelf_of(folder)
    with pytest.raises(ValueError, match="'wide' cannot be served: has rank 9; FASTREFT_MOST_R is 8"):
        shelf.find("wide")
    weights = folder / "one" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"'one' cannot be served: .* cannot be read") as error:
        shelf.find("one")
    assert str(shelf.copies) not in str(error.value)
    with pytest.raises(ValueError, match=r"edits model\.layers\.2, which the model does not have"):
        shelf_of(folder, layers=2).find("two")
    with pytest.raises(ValueError, match="is for a hidden size of"):
        shelf_of(folder, width=64).find("two")
    assert shelf.find("two")
    assert sorted(path.name for path in shelf.copies.iterdir()) == [shelf.find("two")[0]]


def test_what_is_not_a_whole_blocks_output_is_refused(folder):
    config = ReftConfig(r=2, component="mlp_output", task_type="CAUSAL_LM", init_weights="random")
    get_reft_model(make("llama"), config).save_pretrained(folder / "mlp")
    with pytest.raises(ValueError, match="only what whole blocks give can be served here"):
        shelf_of(folder).find("mlp")
