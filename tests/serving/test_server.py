"""vLLM's server with adapters as its models, over HTTP: every answer is Transformers' with its adapter alone, whatever comes,
changes and goes meanwhile. ``make test-vllm`` runs it, and ``make soak SOAK=600`` its last test for so many seconds."""

import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed; make test-vllm makes an environment for it")

import malformed
import soak
from safetensors.torch import load_file, save_file
from served import KINDS, Server, base_model, greedy, loaded, saved, written

TOKENS = 8
SPOILT = ["cut", "gone", "wide", "deep", "nan", "lora", "json"]
CHAT = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """Adapters that are sound, and some that are not."""
    folder = tmp_path_factory.mktemp("server") / "adapters"
    for i, (name, settings) in enumerate(KINDS.items()):
        saved(folder / name, i, settings)
    for spoilt in SPOILT:
        shutil.copytree(folder / "ada", folder / spoilt)
    weights = {name: folder / name / "adapter_model.safetensors" for name in SPOILT}
    weights["cut"].write_bytes(weights["cut"].read_bytes()[:100])
    weights["gone"].unlink()
    tensors = load_file(weights["wide"])
    save_file({name: torch.cat([t, t], -1) if t.ndim == 2 else t for name, t in tensors.items()}, weights["wide"])
    save_file({name.replace("layers.4", "layers.40"): t for name, t in tensors.items()}, weights["deep"])
    save_file({name: torch.full_like(t, torch.nan) for name, t in tensors.items()}, weights["nan"])
    (folder / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA", "task_type": "CAUSAL_LM"}')
    (folder / "json" / "adapter_config.json").write_text("{")
    saved(folder / "high", 0, dict(r=65, positions="l1"))
    return folder


@pytest.fixture(scope="module")
def server(shelf):
    chat = shelf.parent / "chat.jinja"
    chat.write_text(CHAT)
    with Server(shelf, shelf.parent / "server.log", "--chat-template", str(chat)) as running:
        yield running


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(20, 1000, (n,), generator=generator).tolist() for n in (7, 180)]


@pytest.fixture(scope="module")
def expected(shelf, prompts):
    models = {"embedded": base_model()} | {name: loaded(shelf / name) for name in KINDS}
    found = {name: [written(model, ids, TOKENS)[0] for ids in prompts] for name, model in models.items()}
    assert all(found[name] != found["embedded"] for name in KINDS)
    return found


def test_adapters_are_models(server, shelf):
    listed = json.loads(server.get("/v1/models")[1])["data"]
    assert [each["id"] for each in listed] == ["embedded", *sorted([*KINDS, *SPOILT, "high"])]
    assert {each["id"]: each["parent"] for each in listed if each["id"] in ("embedded", "ada")} == {
        "embedded": None, "ada": "embedded",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["embedded", *KINDS])
def test_the_model_names_the_adapter(server, prompts, expected, name):
    for ids, wanted in zip(prompts, expected[name], strict=True):
        body = greedy(ids, TOKENS)
        status, answer = server.ask({"model": name, **body})
        assert (status, answer["model"], answer["choices"][0]["token_ids"]) == (200, name, wanted)
        parts = list(server.stream({"model": name, **body}))
        assert {part["model"] for part in parts} == {name}
        assert [token for part in parts for token in part["choices"][0]["token_ids"]] == wanted
        asked = {} if name == "embedded" else {"vllm_xargs": {"reft": name}}
        assert server.ask({"model": "embedded", **body, **asked})[1]["choices"][0]["token_ids"] == wanted


def test_chats_name_it_too(server, expected, shelf):
    body = {"messages": [{"role": "user", "content": [{"type": "text", "text": "Once upon a"}]}], "max_tokens": TOKENS,
            "temperature": 0, "ignore_eos": True, "return_token_ids": True}  # fmt: skip
    for name, model in (("embedded", base_model()), ("ada", loaded(shelf / "ada"))):
        status, answer = server.ask({"model": name, **body}, "/v1/chat/completions")
        assert (status, answer["model"]) == (200, name)
        wanted, _ = written(model, answer["prompt_token_ids"], TOKENS)
        assert answer["choices"][0]["token_ids"] == wanted
        parts = server.stream({"model": name, **body}, "/v1/chat/completions")
        choices = [each for part in parts for each in part["choices"]]
        assert [token for each in choices for token in each.get("token_ids") or []] == wanted


def test_an_adapter_named_as_a_kind_of_content_is_not_applied_unasked(server, shelf, prompts):
    shutil.copytree(shelf / "ada", shelf / "text")
    body = {"messages": [{"role": "user", "content": [{"type": "text", "text": "Once upon a"}]}], "max_tokens": TOKENS,
            "temperature": 0, "return_token_ids": True}  # fmt: skip
    found = {name: server.ask({"model": name, **body}, "/v1/chat/completions")[1] for name in ("embedded", "text")}
    assert found["embedded"]["choices"][0]["token_ids"] != found["text"]["choices"][0]["token_ids"]
    shutil.rmtree(shelf / "text")


@pytest.mark.parametrize(
    ("changes", "status", "said"),
    [
        ({"model": "nobody"}, 404, "`nobody` does not exist"),
        ({"model": "../ada"}, 404, "does not exist"),
        ({"model": "embedded", "vllm_xargs": {"reft": "nobody"}}, 400, "there is no adapter 'nobody'"),
        ({"vllm_xargs": {"reft": "bob"}}, 400, "the model is the adapter 'ada', and 'reft' names 'bob'"),
        ({"vllm_xargs": {"reft_strength": -1}}, 400, "there is no argument 'reft_strength'"),
        ({"vllm_xargs": {"reft_scale": "much"}}, 400, "'reft_scale' is 'much'; it must be a number"),
        ({"model": "embedded", "vllm_xargs": {"reft_scale": 2.0}}, 400, "the request names no adapter"),
        ({"model": "cut"}, 400, "'cut' cannot be served: the adapter in 'cut' cannot be read"),
        ({"model": "deep"}, 400, "edits model.layers.40, which the model does not have"),
        ({"model": "high"}, 400, "has rank 65; FASTREFT_MOST_R is 64"),
        ({"model": "wide"}, 400, "'wide' cannot be served"),
    ],
)
def test_what_is_refused_before_an_answer_begins(server, changes, status, said):
    for stream in (False, True):
        found, answer = server.ask({"model": "ada", **greedy([5, 6, 7], 2), "stream": stream, **changes})
        assert found == status and said in answer["error"]["message"], answer


def test_beams_with_an_adapter_are_refused(server):
    """Their every step is a request whose prompt is what was written so far."""
    for asked in ({"model": "ada"}, {"model": "embedded", "vllm_xargs": {"reft": "ada"}}):
        body = {**greedy([5, 6, 7], 2), "use_beam_search": True, "n": 2, **asked}
        status, answer = server.ask(body)
        assert status == 400 and answer["error"]["message"] == "use_beam_search is not served with an adapter"
        body = {"messages": [{"role": "user", "content": "Once"}], "use_beam_search": True, "n": 2, **asked}
        status, answer = server.ask(body, "/v1/chat/completions")
        assert status == 400 and answer["error"]["message"] == "use_beam_search is not served with an adapter"
    assert server.ask({"model": "embedded", **greedy([5, 6, 7], 2), "use_beam_search": True, "n": 2})[0] == 200


def test_two_hundred_malformed_requests_are_each_a_sentence(server, prompts, expected):
    for what, body in malformed.requests([*SPOILT, "high"], 200):
        status, answer = server.ask(body)
        said = answer["error"]["message"] if "error" in answer else answer["detail"]  # FastAPI's, of what is no text
        assert 400 <= status < 500 and said.strip(), (what, body[:500], answer)
    _, answer = server.ask({"model": "ada", **greedy(prompts[0], TOKENS)})
    assert answer["choices"][0]["token_ids"] == expected["ada"][0]


# A stage of a pipeline gets its buffer in vLLM's warm-up, which an eager CPU leaves out: it fails there without adapters, too.
@pytest.mark.parametrize(("flag", "eager"), [("--tensor-parallel-size", True), ("--pipeline-parallel-size", False)])
def test_two_ranks_write_what_one_does(shelf, prompts, expected, tmp_path, flag, eager):
    with (
        Server(shelf, tmp_path / "server.log", flag, "2", eager=eager) as server,
        ThreadPoolExecutor(len(expected)) as threads,
    ):
        assert len([name for name in server.memory() if "Worker" in name]) == 2
        for which, ids in enumerate(prompts):
            for _ in range(2):  # the second time from the prefix cache
                bodies = [{"model": name, **greedy(ids, TOKENS)} for name in expected]
                answers = [answer for _, answer in threads.map(server.ask, bodies)]
                found = {answer["model"]: answer["choices"][0]["token_ids"] for answer in answers}
                assert found == {name: wanted[which] for name, wanted in expected.items()}


def test_adapters_come_change_and_go_while_clients_ask_and_vanish(tmp_path):
    seconds = float(os.environ.get("FASTREFT_SOAK", "20"))
    contents = soak.made(tmp_path / "contents")
    (tmp_path / "live").mkdir()
    with Server(tmp_path / "live", tmp_path / "server.log", "--vectors", "12", "--lines", "4") as server:
        report = soak.run(server, tmp_path / "live", contents, seconds)
        print("\n" + "\n".join(report.lines()))
        until = time.monotonic() + 30  # what vanished clients asked for is dropped
        while time.monotonic() < until and server.gauge("num_requests_running") + server.gauge("num_requests_waiting"):
            time.sleep(0.5)
        assert server.gauge("num_requests_running") + server.gauge("num_requests_waiting") == 0
    assert report.faults == [] and report.right > 0 and report.vanished > 0 and report.changes > 0
    assert report.sent == report.right + report.refused + report.vanished
    if seconds >= 60:  # a short run is all start
        assert report.growth() < 20, report.memory
