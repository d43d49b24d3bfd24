"""The plugin in vLLM itself: the tokens of every request are Transformers' with its adapter alone. ``make test-vllm`` runs it
in an environment of its own."""

import os
import shutil

import pytest
import torch

vllm = pytest.importorskip("vllm", reason="vLLM is not installed; make test-vllm makes an environment for it")

from served import KINDS, loaded, saved, written  # noqa: E402
from vllm.exceptions import VLLMValidationError  # noqa: E402

from fastreft.tasks.places import EMBEDDED_PATH  # noqa: E402

TOKENS = 8
ORDER = ["ada", "bob", "base", "cid", "ada", "dot", "eve", "fay"]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """The adapters, two prompts and what Transformers writes after them."""
    folder = tmp_path_factory.mktemp("shelf")
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(20, 1000, (n,), generator=generator).tolist() for n in (7, 180)]
    models = {name: saved(folder / name, i, settings) for i, (name, settings) in enumerate(KINDS.items())}
    expected = {name: [written(model, ids, TOKENS)[0] for ids in prompts] for name, model in models.items()}
    with models["ada"].disable_adapter():
        expected["base"] = [written(models["ada"], ids, TOKENS)[0] for ids in prompts]
    assert all(expected[name] != expected["base"] for name in KINDS)
    return folder, prompts, expected


@pytest.fixture(scope="module")
def engine(shelf):
    os.environ |= {  # so few vectors that a batch does not fit, and the pool grows
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1",
        "FASTREFT_ADAPTERS": str(shelf[0]), "FASTREFT_VECTORS": "6", "FASTREFT_LINES": "8",
    }  # fmt: skip
    return vllm.LLM(
        str(EMBEDDED_PATH), dtype="float32", max_model_len=256, enforce_eager=True, max_num_seqs=8,
        enable_prefix_caching=True, enable_chunked_prefill=True, max_num_batched_tokens=64,
    )  # fmt: skip


def ask(engine, prompts, names):
    settings = [
        vllm.SamplingParams(
            max_tokens=TOKENS, temperature=0, ignore_eos=True, extra_args=None if name == "base" else {"reft": name}
        )
        for name in names
    ]
    return engine.generate([{"prompt_token_ids": ids} for ids in prompts], settings, use_tqdm=False)


def test_a_batch_of_many_in_chunks_with_prefixes_kept(shelf, engine):
    _, prompts, expected = shelf
    for which in (0, 1, 1):  # the second time its blocks are in the cache, each adapter's own
        found = ask(engine, [prompts[which]] * len(ORDER), ORDER)
        assert [list(each.outputs[0].token_ids) for each in found] == [expected[name][which] for name in ORDER]
    assert all(each.num_cached_tokens > 0 for each in found)


def test_one_adapter_at_several_strengths(shelf, engine):
    """Each request its own, in one batch, and none of them from another's blocks of the prefix cache."""
    folder, prompts, expected = shelf
    model, scales = loaded(folder / "cid"), (1.0, -30.0, 0.0, 30.0)
    settings = [
        vllm.SamplingParams(
            max_tokens=TOKENS, temperature=0, ignore_eos=True, extra_args={"reft": "cid", "reft_scale": scale}
        )
        for scale in scales
    ]
    for which in (0, 1):
        wanted = []
        for scale in scales:
            with model.reft(scale=scale):
                wanted.append(written(model, prompts[which], TOKENS)[0])
        assert wanted[0] == expected["cid"][which] and wanted[2] == expected["base"][which]
        assert len({*map(tuple, wanted)}) == (4, 3)[which]  # the long prompt's edit of strength 1 changes no token
        for _ in range(2):
            found = engine.generate([{"prompt_token_ids": prompts[which]}] * len(scales), settings, use_tqdm=False)
            assert [list(each.outputs[0].token_ids) for each in found] == wanted
    settings[0].extra_args = {"reft_scale": 2.0}
    with pytest.raises(VLLMValidationError, match="the request names no adapter"):
        engine.generate([{"prompt_token_ids": prompts[1]}], settings[:1], use_tqdm=False)


def test_what_there_is_not_is_refused_and_the_rest_go_on(shelf, engine):
    _, prompts, expected = shelf
    for name in ("nobody", "../ada", 3):
        with pytest.raises(VLLMValidationError, match="there is no adapter"):
            ask(engine, prompts[:1], [name])
    (found,) = ask(engine, prompts[:1], ["bob"])
    assert list(found.outputs[0].token_ids) == expected["bob"][0]


def test_an_adapter_that_is_replaced_between_two_requests(shelf, engine):
    folder, prompts, expected = shelf
    new = saved(folder.parent / "new", 9, dict(r=4, positions="all"))
    wanted, _ = written(new, prompts[1], TOKENS)
    assert wanted != expected["ada"][1]
    shutil.rmtree(folder / "ada")
    shutil.copytree(folder.parent / "new", folder / "ada")
    (found,) = ask(engine, prompts[1:], ["ada"])
    assert list(found.outputs[0].token_ids) == wanted and found.num_cached_tokens == 0
