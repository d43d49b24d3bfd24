"""``fastreft report``: the page, and the numbers on it."""

import json
import re

import pytest
import torch
from shell import fails

from fastreft import ReftConfig, get_reft_model
from fastreft.cli import main
from fastreft.tasks.edited import pieces
from fastreft.tasks.models import load_base, load_tokenizer
from fastreft.tasks.report import measured
from fastreft.tuner.loading import layers_of

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An adapter and its log, of a training of a few steps."""
    folder = tmp_path_factory.mktemp("trained")
    records = [{"prompt": f"The {who} was {what}.", "completion": f' "I am {what}," said the {who}.'}
               for who in ("king", "queen", "boy") for what in ("sad", "glad", "old", "hungry")]  # fmt: skip
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    flags = ["--model", "embedded", "--train_file", str(folder / "data.jsonl"), "--hold_out", "3", "--r", "2"]
    flags += ["--positions", "f1+l2", "--learning_rate", "0.02", "--max_steps", "4", "--logging_steps", "1"]
    flags += ["--eval_strategy", "steps", "--eval_steps", "2", "--save_strategy", "no", "--report_to", "none"]
    assert main(["train", *flags, "--output_dir", str(folder / "out"), "--use_cpu", "true"]) == 0
    return folder / "out"


def test_the_page_is_whole_and_stands_alone(trained):
    assert main(["report", "--adapter", str(trained), "--records", "2", "--max_new_tokens", "4"]) == 0
    page = (trained / "report.html").read_text()
    for title in (
        "Training",
        "Before and after",
        "How far each layer",
        "subspaces lie",
        "read through the unembedding",
    ):
        assert title in page
    assert page.count("prefers-color-scheme") == page.count("<picture>") + 1 > 4
    assert not re.search(r"(src|href|url)\s*[=(]\s*[\"']?(?!data:)\w", page.replace("srcset", "src"))
    assert "said the boy" in page and "<mark>" in page and "{{" not in page
    again = page
    assert main(["report", "--adapter", str(trained), "--records", "2", "--max_new_tokens", "4"]) == 0
    assert (trained / "report.html").read_text() == again


def test_texts_of_ones_own_are_escaped(trained, tmp_path):
    out = tmp_path / "page.html"
    assert main(["report", "--adapter", str(trained), "--prompt", "<b>King</b> & queen", "--output", str(out)]) == 0
    assert "<b>King" not in out.read_text() and "&lt;" in out.read_text()


def test_an_adapter_whose_data_is_gone_has_a_page_all_the_same(trained):
    data = trained.parent / "data.jsonl"
    data.rename(data.with_suffix(".away"))
    try:
        assert main(["report", "--adapter", str(trained), "--output", str(trained / "page.html")]) == 0
    finally:
        data.with_suffix(".away").rename(data)
    assert "cannot be read" in (trained / "page.html").read_text()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = ReftConfig(
        task_type="CAUSAL_LM", r=2, positions="f1+l2", layers_to_transform=[1, 4], init_weights="random"
    )
    return get_reft_model(load_base("embedded", "float32"), config).eval()


def test_the_edits_are_what_the_interventions_do(model):
    tokenizer = load_tokenizer("embedded")
    ids = tokenizer("The king was hungry.").input_ids
    found = measured.edits_of(model, ids, writes=True)
    edited = [0, len(ids) - 2, len(ids) - 1]
    assert found.share.shape == (2, len(ids)) and found.share.nonzero()[:, 1].tolist() == edited * 2
    with model.disable_adapter(), torch.no_grad():
        hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[2][0]  # behind layer 1
    with torch.no_grad():
        change = layers_of(model)[0].interventions("default")[0](hidden) - hidden
    torch.testing.assert_close(found.moved[0][edited], change[edited], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        found.share[0, edited], (change.norm(dim=-1) / hidden.norm(dim=-1))[edited], rtol=1e-3, atol=1e-4
    )


def test_overlaps(model):
    one, other = (layer.interventions("default")[0] for layer in layers_of(model))
    with torch.no_grad():
        other.R.copy_(one.R.flip(0))  # the same subspace
        torch.testing.assert_close(measured.overlaps(model), torch.ones(2, 2))
        other.R.copy_(torch.linalg.qr(torch.cat([one.R, torch.randn(2, one.R.shape[1])]).T).Q.T[2:])
    torch.testing.assert_close(measured.overlaps(model), torch.eye(2), rtol=0, atol=1e-5)


def test_a_direction_is_read_as_the_token_whose_it_is(model):
    tokenizer = load_tokenizer("embedded")
    token = tokenizer(" king", add_special_tokens=False).input_ids[-1]
    base = model.get_base_model()
    row = base.get_output_embeddings().weight[token].detach().float() * base.model.norm.weight.detach().float()
    texts = [measured.Edits(torch.ones(2, 1), [3 * row[None] / row.norm(), -row[None]])]
    first, second = measured.directions(model, tokenizer, texts)
    assert first.up[0] == second.down[0] == tokenizer.decode([token]) and first.part == pytest.approx(1)


def test_the_pieces_make_the_text():
    tokenizer = load_tokenizer("embedded")
    ids = tokenizer("The king, who was hungry, said: no.").input_ids
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--adapter", "nowhere"], "there is no adapter in 'nowhere'"),
        (["--output", "page.pdf"], "ends in .html"),
        (["--prompt", ""], "--prompt is empty"),
        (["--data_dir", "nowhere"], "no data folder 'nowhere'"),
        (["--records", "0"], "must be at least 1"),
    ],
)
def test_what_is_refused(trained, flags, said, capsys):
    fails(main(["report", "--adapter", str(trained), *flags]), capsys, said)
