"""The shelf of adapters that requests name: found, refused, replaced; without vLLM."""

import shutil
from concurrent.futures import ThreadPoolExecutor

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


@pytest.mark.parametrize(
    "name", ["", "nobody", "../shelf", "one/../two", 3, None, ".new", "..", "a" * 300, "one\x00", "\ud800"]
)
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


def test_a_folder_that_is_being_filled_beside_the_others_is_none(folder):
    shelf = shelf_of(folder)
    shutil.copytree(folder / "one", folder / ".new")
    assert ".new" not in shelf.names()
    (folder / ".new").rename(folder / "new")
    assert "new" in shelf.names() and shelf.find("new") == shelf.find("one")


def test_files_that_change_while_they_are_copied_are_copied_again(folder, monkeypatch):
    """Else the configuration might be of one adapter and the weights of the next."""
    shelf, copy, copied = shelf_of(folder), shutil.copy, []
    wanted = shelf.find("two")[0]

    def slow(source, target):
        copy(source, target)
        if not copied:  # the other adapter comes after the first file
            shutil.copytree(folder / "two", folder / "one", dirs_exist_ok=True)
        copied.append(source.name)

    monkeypatch.setattr(shutil, "copy", slow)
    assert shelf.find("one")[0] == wanted and len(copied) == 4


def test_copies_that_no_name_stands_for_are_taken_away_in_time(folder, monkeypatch):
    shelf = shelf_of(folder)
    old = shelf.find("one")
    two = shelf.find("two")
    shutil.copytree(folder / "two", folder / "one", dirs_exist_ok=True)
    assert shelf.find("one")[0] == two[0] and (shelf.copies / old[0]).is_dir()  # of a request that came before
    monkeypatch.setattr("fastreft.serving.vllm.shelf.KEPT", -1.0)
    shutil.copytree(folder / "two", folder / "again")
    assert shelf.find("again")[0] == two[0]
    assert [path.name for path in shelf.copies.iterdir()] == [two[0]]
    shutil.rmtree(shelf.copies / two[0])  # as the system's own sweeping may
    assert shelf.find("two") == two and (shelf.copies / two[0]).is_dir()


def test_many_threads_ask_for_one_new_adapter(folder):
    shelf = shelf_of(folder)
    with ThreadPoolExecutor(8) as threads:
        assert len(set(threads.map(shelf.find, ["one"] * 32))) == 1


def test_what_is_not_a_whole_blocks_output_is_refused(folder):
    config = ReftConfig(r=2, component="mlp_output", task_type="CAUSAL_LM", init_weights="random")
    get_reft_model(make("llama"), config).save_pretrained(folder / "mlp")
    with pytest.raises(ValueError, match="only what whole blocks give can be served here"):
        shelf_of(folder).find("mlp")
