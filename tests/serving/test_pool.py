"""The pool of adapters: what it edits, what it keeps, what it refuses, and what gives way to what."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import LAYERS, WIDTH, make

from fastreft import ReftConfig, get_reft_model
from fastreft.serving import AdapterPool, read
from fastreft.serving.pool import PoolFull
from fastreft.serving.ranges import Ranges

PLACES = [f"model.layers.{i}" for i in range(LAYERS)]
KINDS = {
    "plain": dict(r=4, positions="f1+l2"),
    "apart": dict(r=3, positions="f2+l1", tied=False),
    "act": dict(r=2, positions="all", act_fn="silu"),
    "some": dict(r=5, positions="l1", intervention_type="noreft", add_bias=True, layers_to_transform=[1]),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An adapter of each kind in a folder, and the model that it is for."""
    found = {}
    for i, (name, settings) in enumerate(KINDS.items()):
        torch.manual_seed(i)
        model = get_reft_model(make("llama"), ReftConfig(task_type="CAUSAL_LM", init_weights="random", **settings))
        found[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(found[name])
    return found


def pool_for(vectors=40, lines=10, **more):
    return AdapterPool(PLACES, WIDTH, vectors=vectors, lines=lines, **more)


def edited(folder, place, hidden, share=0):
    """What the adapter's own model makes of a hidden state."""
    config = ReftConfig.from_pretrained(folder)
    from peft import PeftModel

    from fastreft.tuner.loading import layers_of

    model = PeftModel.from_pretrained(make("llama"), folder)
    layer = next((each for each in layers_of(model) if each.name.endswith(PLACES[place])), None)
    assert config.peft_type == "REFT"
    with torch.no_grad():
        return hidden if layer is None else layer.interventions("default")[share](hidden.clone())


def test_rows_are_edited_as_the_adapters_edit_them(folders):
    pool = pool_for()
    for name, folder in folders.items():
        pool.add(name, folder)
    assert pool.names() == sorted(KINDS)
    where = pool.take(KINDS)
    torch.manual_seed(0)
    hidden = torch.randn(2, 6, WIDTH)
    rows = torch.tensor([0, 1, 4, 7, 8])
    lines = torch.tensor([where["plain"].line, where["apart"].line, where["apart"].line + 1, where["act"].line,
                          where["some"].line])  # fmt: skip
    asked = [("plain", 0), ("apart", 0), ("apart", 1), ("act", 0), ("some", 0)]
    for place in range(LAYERS):
        got = pool.edit_(place, hidden.clone(), rows, lines).view(-1, WIDTH)
        for row, (name, share) in zip(rows.tolist(), asked, strict=True):
            wanted = edited(folders[name], place, hidden.view(-1, WIDTH)[row], share)
            assert torch.equal(got[row], wanted), (place, name)
        others = [i for i in range(12) if i not in rows.tolist()]
        assert torch.equal(got[others], hidden.view(-1, WIDTH)[others])


def test_an_adapter_at_two_strengths_is_two(folders):
    pool = pool_for()
    assert pool.add("half", folders["plain"], 0.5) == pool.add("plain", folders["plain"]) + "@0.5"
    pool._host.clear()  # and from its folder again
    pool._host_holds = 0
    where = pool.take(["half", "plain"])
    hidden = torch.randn(2, WIDTH)
    lines = torch.tensor([where["half"].line, where["plain"].line])
    got = pool.edit_(0, hidden.clone(), torch.tensor([0, 1]), lines)
    for row, scale in enumerate((0.5, 1.0)):
        wanted = hidden[row] + scale * (edited(folders["plain"], 0, hidden[row], 0) - hidden[row])
        torch.testing.assert_close(got[row], wanted)
    assert torch.equal(got[1], edited(folders["plain"], 0, hidden[1], 0))


def test_what_was_used_longest_ago_gives_way(folders):
    pool = pool_for(vectors=10, lines=3)  # "plain" takes 4 vectors, "act", whose V and P are apart, 4, "apart" 6
    for name in ("plain", "apart", "act"):
        pool.add(name, folders[name])
    plain, act = (pool.take([name])[name] for name in ("plain", "act"))
    pool.take(["plain"])
    apart = pool.take(["apart"])["apart"]
    assert apart.vector == act.vector == 4 and apart.line == act.line == 1  # "plain" was used since
    assert pool.take(["plain"])["plain"] == plain
    with pytest.raises(PoolFull, match="the adapters in use fill"):
        pool.take(["act"], in_use=[pool.fingerprint(name) for name in ("plain", "apart")])
    act = pool.take(["act"], in_use=[pool.fingerprint("plain")])["act"]
    assert not pool.table[:, 2].any() and pool.table[:, act.line].any()  # no line is left of what has gone


def test_a_name_that_is_given_another_content(folders):
    pool = pool_for()
    old = pool.add("it", folders["plain"])
    before = pool.take(["it"])["it"]
    lines = pool.table.clone()
    new = pool.add("it", folders["act"])
    assert old != new == pool.fingerprint("it") and torch.equal(pool.table, lines)  # who is at work is not disturbed
    after = pool.take(["it"], in_use=[old])["it"]
    assert after.line != before.line and after.adapter.fingerprint == new
    assert pool.add("other name", folders["act"]) == new
    assert pool.take(["other name"])["other name"].line == after.line
    pool.remove("it")
    with pytest.raises(KeyError, match="no adapter 'it'; there are 1"):
        pool.take(["it"])
    assert pool.take(["other name"])["other name"].line == after.line


def test_the_host_keeps_so_many_bytes_and_the_folder_has_the_rest(folders, tmp_path):
    pool = pool_for(vectors=6, lines=2, host_bytes=1)
    shutil.copytree(folders["plain"], tmp_path / "plain")
    pool.add("plain", tmp_path / "plain")
    pool.add("apart", folders["apart"])
    assert len(pool._host) == 1
    pool.take(["apart"])
    pool.take(["plain"])  # read again
    pool.take(["apart"])
    shutil.copytree(folders["act"], tmp_path / "plain", dirs_exist_ok=True)
    with pytest.raises(ValueError, match="is not what was added from there; add it again"):
        pool.take(["plain"])
    assert pool.take(["apart"])


def spoilt(folder, to, how):
    shutil.copytree(folder, to)
    weights, config = to / "adapter_model.safetensors", to / "adapter_config.json"
    if how == "cut":
        weights.write_bytes(weights.read_bytes()[:200])
    elif how == "no file":
        weights.unlink()
    elif how == "nan":
        tensors = load_file(weights)
        next(iter(tensors.values())).view(-1)[0] = torch.nan
        save_file(tensors, weights)
    elif how == "rank":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"r": 7}))
    elif how == "json":
        config.write_text("{")
    elif how == "lora":
        config.write_text(json.dumps({"peft_type": "LORA", "task_type": "CAUSAL_LM"}))
    return to


@pytest.mark.parametrize("how", ["cut", "no file", "nan", "rank", "json", "lora"])
def test_a_spoilt_adapter_is_refused_and_the_rest_go_on(folders, tmp_path, how):
    pool = pool_for()
    pool.add("good", folders["plain"])
    where = pool.take(["good"])
    for name in ("good", "bad"):
        with pytest.raises(ValueError, match="cannot be read") as error:
            pool.add(name, spoilt(folders["plain"], tmp_path / name, how))
        assert "\n" not in str(error.value)
    assert pool.names() == ["good"] and pool.take(["good"])["good"].line == where["good"].line


def test_an_adapter_of_another_model_is_refused(folders):
    with pytest.raises(ValueError, match=r"edits model\.layers\.2, which the model does not have"):
        AdapterPool(PLACES[:2], WIDTH, vectors=9, lines=9).add("it", folders["plain"])
    with pytest.raises(ValueError, match=f"is for a hidden size of {WIDTH}; the model's is 64"):
        AdapterPool(PLACES, 64, vectors=9, lines=9).add("it", folders["plain"])
    with pytest.raises(ValueError, match="takes 4 vectors and 1 lines; the pool has 3 and 9"):
        pool_for(vectors=3, lines=9).add("it", folders["plain"])
    with pytest.raises(ValueError, match="has rank 4; the pool's most_r is 2"):
        pool_for(most_r=2).add("it", folders["plain"])
    with pytest.raises(ValueError, match="vectors is 0"):
        pool_for(vectors=0)


def test_the_fingerprint_is_of_the_content(folders, tmp_path):
    one = read(folders["plain"], PLACES, WIDTH)
    shutil.copytree(folders["plain"], tmp_path / "copy")
    assert read(tmp_path / "copy", PLACES, WIDTH).fingerprint == one.fingerprint
    config = tmp_path / "copy" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"positions": "f2+l2"}))
    assert read(tmp_path / "copy", PLACES, WIDTH).fingerprint != one.fingerprint


def test_ranges():
    ranges = Ranges(10)
    assert [ranges.take(4), ranges.take(4), ranges.take(4)] == [0, 4, None]
    ranges.give_back(0, 4)
    assert [ranges.take(2), ranges.take(3), ranges.take(2)] == [0, None, 2]
    for start, count in ((4, 4), (0, 2), (2, 2)):
        ranges.give_back(start, count)
    assert ranges.take(10) == 0


def test_ten_thousand_adapters_take_what_is_said():
    """Rank 4 on 32 layers of 4096 in bf16: 2.1 MB each, 21 GB for ten thousand on the host; 64 of them on the device."""
    each = 32 * 4 * (2 * 4096 + 2) * 2 + 32 * 4 * 4
    with torch.device("meta"):
        pool = AdapterPool(
            [str(i) for i in range(32)], 4096, vectors=256, lines=64, dtype=torch.bfloat16, device="meta"
        )
    assert pool.bytes == 64 * each and 2.0e6 < each < 2.2e6
