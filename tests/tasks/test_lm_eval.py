"""lm-evaluation-harness with an adapter: what it scores and writes against the bare model under plain hooks, one by one."""

from __future__ import annotations

import json
import sys
import warnings
from functools import partial

import pytest
import torch
from tiny import adapter_weights, columns, hooked

import fastreft
from fastreft.tasks.errors import UserError
from fastreft.tasks.models import load_base, load_tokenizer, save_adapter

pytest.importorskip("lm_eval", reason="no lm-evaluation-harness: pip install 'fastreft[harness]'")
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from fastreft.tasks import harness

ENDINGS = [" home", " to the river", " and slept", " under the old tree by the mill"]
QUESTIONS = [
    {"question": f"The {who} was {how}, so {it} went", "answers": ENDINGS, "right": (i + j) % 4}
    for i, (who, it) in enumerate((("king", "he"), ("girl", "she"), ("little old woman", "she")))
    for j, how in enumerate(("tired", "sad and cold"))
]
CHOOSE = """
task: endings
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{answers}}"
doc_to_target: right
target_delimiter: ""
metric_list: [{metric: acc}]
"""
WRITE = """
task: continued
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answers[0]}}"
generation_kwargs: {until: ["NOTHING"], max_gen_toks: 6}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the tasks and their data, and an adapter of the embedded model whose edits change its answers."""
    folder = tmp_path_factory.mktemp("harness")
    data = folder / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, QUESTIONS)))
    for name, text in (("endings", CHOOSE), ("continued", WRITE)):
        (folder / f"{name}.yaml").write_text(text.replace("DATA", str(data)))
    config = fastreft.ReftConfig(task_type="CAUSAL_LM", r=2, positions="f2+l2", init_weights="random")
    torch.manual_seed(0)
    model = fastreft.get_reft_model(load_base("embedded"), config)
    for name, parameter in model.named_parameters():
        if name.endswith(".b"):
            parameter.data = 8 * torch.randn_like(parameter)
    save_adapter(model, load_tokenizer("embedded"), "embedded", str(folder / "adapter"))
    return folder


@pytest.fixture(scope="module")
def lm(place):
    return harness.ReftLM(peft=str(place / "adapter"), device="cpu", batch_size=5)


def evaluate(lm, place, task, **more):
    tasks = TaskManager(include_path=str(place), include_defaults=False)
    return simple_evaluate(lm, tasks=[task], task_manager=tasks, bootstrap_iters=0, log_samples=True, **more)


def by_hand(lm, context, continuation):
    """Log-likelihood of a continuation on the bare model, hooks editing the first and last two tokens of the context."""
    ids = torch.tensor([context + continuation])
    base, weights = lm.model.get_base_model(), adapter_weights(lm.model)
    chosen = columns(torch.ones(1, len(context)), 2, 2)
    with lm.model.disable_adapter(), hooked(base, weights, chosen), torch.no_grad():
        logits = base(ids).logits[0].log_softmax(-1)
    at = range(len(context) - 1, len(context) + len(continuation) - 1)
    return sum(float(logits[i, token]) for i, token in zip(at, continuation, strict=True))


def test_choices_are_scored_with_the_edits_of_their_prompts(place, lm):
    encoded = [[lm._encode_pair(q["question"], answer) for answer in ENDINGS] for q in QUESTIONS]
    wanted = [[by_hand(lm, *pair) for pair in pairs] for pairs in encoded]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # that all of the input was taken for the prompt
        results = evaluate(lm, place, "endings")
    samples = sorted(results["samples"]["endings"], key=lambda sample: sample["doc_id"])
    found = [[float(answer[0][0]) for answer in sample["resps"]] for sample in samples]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-4, atol=1e-4)
    best = [row.index(max(row)) for row in wanted]
    accuracy = sum(a == q["right"] for a, q in zip(best, QUESTIONS, strict=True)) / len(QUESTIONS)
    assert results["results"]["endings"]["acc,none"] == pytest.approx(accuracy)
    # The harness's own model takes the answer for a part of the prompt: other tokens edited, another score.
    theirs = evaluate(HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=5), place, "endings")
    samples = sorted(theirs["samples"]["endings"], key=lambda sample: sample["doc_id"])
    other = [[float(answer[0][0]) for answer in sample["resps"]] for sample in samples]
    assert (torch.tensor(other) - torch.tensor(wanted)).abs().max() > 0.1


def test_the_same_tokens_as_another_prompt_and_answer(lm):
    requests = [(None, [5, 6, 7], [8]), (None, [5, 6], [7, 8]), (None, [5], [6, 7, 8])]
    requests += [(None, [9, 0], [0, 0]), (None, [9, 0, 0], [3])]  # zeros, which are padding and a token
    found = [score for score, _ in lm._loglikelihood_tokens(requests, disable_tqdm=True)]
    assert found == pytest.approx([by_hand(lm, context, answer) for _, context, answer in requests], rel=1e-4)


def test_a_prompt_that_is_cut_at_the_models_context(lm):
    torch.manual_seed(1)
    context, answer = torch.randint(3, 2000, (600,)).tolist(), [7, 8, 9]
    ((found, _),) = lm._loglikelihood_tokens([(None, context, answer)], disable_tqdm=True)
    assert found == pytest.approx(by_hand(lm, context[-(lm.max_length - 2) :], answer), rel=1e-4)


def test_batches_of_automatic_size(lm, monkeypatch):
    monkeypatch.setattr(lm, "batch_size_per_gpu", "auto")
    monkeypatch.setattr(lm, "max_batch_size", 4)
    ((found, _),) = lm._loglikelihood_tokens([(None, [5, 6, 7], [8])], disable_tqdm=True)
    assert found == pytest.approx(by_hand(lm, [5, 6, 7], [8]), rel=1e-4)


def test_what_is_written_is_what_generate_writes(place, lm):
    results = evaluate(lm, place, "continued")
    for sample in results["samples"]["continued"]:
        ids = lm.tokenizer(sample["doc"]["question"], return_tensors="pt").input_ids
        with torch.no_grad():
            out = lm.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False
            )
        assert sample["resps"][0][0] == lm.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_the_harnesss_command_line(place, monkeypatch, capsys):
    monkeypatch.setattr(
        "lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False)
    )  # which take a minute
    run = [
        "run",
        "--model",
        "reft",
        "--model_args",
        f"peft={place / 'adapter'}",
        "--tasks",
        "endings",
        "--device",
        "cpu",
    ]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *run, "--include_path", str(place), "--batch_size", "4"])
    harness.cli_evaluate()
    out = capsys.readouterr().out
    assert "reft" in out and "endings" in out and "acc" in out


def test_a_model_without_an_adapter_is_refused():
    with pytest.raises(UserError, match="give peft=FOLDER"):
        harness.ReftLM(pretrained="embedded")
    with pytest.raises(UserError, match="this LlamaForCausalLM has none"):
        harness.ReftLM(pretrained=load_base("embedded"))
