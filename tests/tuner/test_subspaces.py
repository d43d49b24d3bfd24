"""Samples of one batch edited with groups of R's rows each, ``subspaces=``."""

import copy

import pytest
import tiny
import torch
import transformers
from checkpoints import REENTRANT
from peft import PeftModel
from torch import nn

from fastreft import ReftConfig, get_reft_model, reference

GROUPS = {"german": [0, 1, 2], "instruct": [3, 4, 5]}
CHOSEN = ["german", None, "instruct", [], "german+instruct"]


def made(base, **settings):
    torch.manual_seed(0)
    settings = {"r": 6, "positions": "f2+l3", "init_weights": "random", "subspaces": GROUPS} | settings
    return get_reft_model(base, ReftConfig(**settings)).eval()


def batch_of():
    torch.manual_seed(1)
    ids = torch.randint(5, 60, (len(CHOSEN), 9))
    mask = torch.ones_like(ids)
    mask[1, :4] = mask[2, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


def xlnet():
    torch.manual_seed(0)  # its hidden states are (tokens, batch, d)
    config = transformers.XLNetConfig(vocab_size=61, d_model=32, n_layer=2, n_head=4, d_inner=48, dropout=0.0)
    return transformers.XLNetLMHeadModel(config)


def alone(run):
    """What ``run`` gives each sample with all samples edited as it is."""
    found = [run(subspaces=[own] * len(CHOSEN)) for own in CHOSEN]
    return [each[i] for i, each in enumerate(found)]


@pytest.mark.parametrize(
    "settings",
    [{}, {"tied": False}, {"tied": "position"}, {"positions": "all"}, {"component": "mlp_output", "positions": "prompt"},
     {"component": "block_input", "act_fn": "relu"}, {"intervention_type": "nodireft", "act_fn": "prelu", "dropout": 0.1}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_mixed_batch_is_each_alone(kind, settings):
    model, batch = made(tiny.make(kind), **settings), batch_of()

    def run(**more):
        with torch.no_grad():
            return model(**batch, **more)[0]

    mixed = run(subspaces=CHOSEN)
    near = 1e-6 if settings.get("act_fn") == "prelu" else 0.0  # torch runs that one, whose GEMM's bits may be a batch's
    for own, one in zip(mixed, alone(run), strict=True):
        assert torch.allclose(own, one, rtol=near, atol=near)
    assert torch.equal(mixed[1], run()[1]) and torch.equal(mixed[4], run()[4])  # all of the edit, as without a word
    with model.disable_adapter():
        assert torch.equal(mixed[3], run()[3])
    assert not torch.equal(mixed[0], run()[0]) and not torch.equal(mixed[0], run(subspaces="instruct")[0])
    numbers = torch.tensor([[0, -1], [0, 1], [1, -1], [-1, -1], [1, 0]])
    assert torch.equal(run(subspaces=numbers), mixed)


def test_another_layout():
    model, batch = made(xlnet()), batch_of()
    with torch.no_grad():
        mixed = model(**batch, subspaces=CHOSEN)[0]
        for own, one in zip(mixed, alone(lambda **more: model(**batch, **more)[0]), strict=True):
            assert torch.equal(own, one)


def test_against_the_formula():
    """Every position, by hooks of a few lines on the plain model, in double; and the gradients."""
    base = tiny.make("llama").double()
    model = made(copy.deepcopy(base), positions="all", layers_to_transform=[1])
    model.base_model.model.model.layers[1].reft.reft_edit["default"].double()
    mask = torch.zeros(5, 1, 6, dtype=torch.float64)
    for i, rows in enumerate(([0, 1, 2], range(6), [3, 4, 5], [], range(6))):
        mask[i, 0, list(rows)] = 1
    R, W, b = tiny.adapter_weights(model)[1]

    def hook(_block, _args, out):
        h = out if isinstance(out, torch.Tensor) else out[0]
        h = h + ((h @ W.T + b - h @ R.T) * mask) @ R
        return h if isinstance(out, torch.Tensor) else (h, *out[1:])

    tiny.blocks(base)[1].register_forward_hook(hook)
    batch = batch_of()
    weight = torch.randn(5, 9, tiny.VOCAB, dtype=torch.float64)
    theirs, ours = base(**batch).logits, model(**batch, subspaces=CHOSEN).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    (theirs * weight).sum().backward()
    (ours * weight).sum().backward()
    own = model.base_model.model.model.layers[1].reft.reft_edit["default"]
    for mine, wanted in ((own.R, R), (own.W, W), (own.b, b)):
        torch.testing.assert_close(mine.grad, wanted.grad, rtol=1e-9, atol=1e-10)


def test_an_edit_by_listed_rows_is_a_plain_one_of_lower_rank():
    """The same numbers as an adapter that has the group's rows and no others."""
    model = made(tiny.make("llama"))
    small = made(tiny.make("llama"), r=3, subspaces=None)
    for big, little in zip(tiny.blocks(model), tiny.blocks(small), strict=True):
        for name, p in little.reft.reft_edit["default"].named_parameters():
            p.data.copy_(big.reft.reft_edit["default"].get_parameter(name)[3:])
    batch = batch_of()
    assert torch.equal(tiny.logits(model, {**batch, "subspaces": "instruct"}), tiny.logits(small, batch))


@REENTRANT
def test_gradients_of_a_recomputed_forward(reentrant):
    batch = batch_of()
    labels = torch.where(torch.arange(9) < 6, -100, batch["input_ids"])
    found = []
    for checkpointed in (False, True):
        model = made(tiny.make("llama")).train()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(**batch, labels=labels, subspaces=["german", [], [], [], "german"]).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)
        assert not gradient[3:].any() and gradient[:3].any(), name


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}, {"use_cache": False}], ids=str
)
@pytest.mark.parametrize("positions", ["f2+l3", "all"])
def test_generation(positions, options):
    model, batch = made(tiny.make("llama"), positions=positions), batch_of()
    count = options.get("num_return_sequences", 1)

    def run(**more):
        wanted = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        return model.generate(**batch, **wanted, **options, **more).view(len(CHOSEN), count, -1)

    mixed = run(subspaces=CHOSEN)
    assert all(torch.equal(own, one) for own, one in zip(mixed, alone(run), strict=True))
    assert not torch.equal(mixed, run())


def test_saved_and_loaded(tmp_path):
    for given in ({"z": [3, 4, 5], "a": [0, 2]}, [[3, 4, 5], [0, 2]], [range(3), (4, 5)]):
        model = made(tiny.make("llama"), subspaces=given)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny.make("llama"), tmp_path)
        assert loaded.peft_config["default"].groups() == model.peft_config["default"].groups()
        for chosen in ([[0]] * 5, [[1]] * 5):  # numbers mean the same, though files sort names
            batch = {**batch_of(), "subspaces": chosen}
            assert torch.equal(tiny.logits(loaded, batch), tiny.logits(model, batch))


def test_two_adapters_have_their_own_groups():
    model = made(tiny.make("llama"))
    model.add_adapter("second", ReftConfig(r=2, positions="l1", subspaces={"instruct": [0], "german": [1]}))
    model.base_model.set_adapter(["default", "second"])
    batch = batch_of()
    together = tiny.logits(model, {**batch, "subspaces": "german"})
    model.set_adapter("default")
    assert not torch.equal(tiny.logits(model, {**batch, "subspaces": "german"}), together)
    model.set_adapter("second")
    with pytest.raises(
        ValueError, match="subspaces names 'other'; the adapter 'second' has the subspaces instruct, german"
    ):
        tiny.logits(model, {**batch, "subspaces": "other"})
    with pytest.raises(ValueError, match="and subspaces are given together"):
        tiny.logits(model, {**batch, "subspaces": "german", "adapter_names": ["default"] * 5})


def test_within_somebodys_module():
    class Around(nn.Module):
        def __init__(self, lm):
            super().__init__()
            self.lm = lm

        def forward(self, input_ids, attention_mask=None, **others):
            return self.lm(input_ids=input_ids, attention_mask=attention_mask, **others)

    model, batch = made(tiny.make("llama")), batch_of()
    with torch.no_grad():
        assert torch.equal(Around(model)(**batch, subspaces=CHOSEN).logits, model(**batch, subspaces=CHOSEN).logits)


def test_the_report_says_them():
    model, batch = made(tiny.make("llama")), batch_of()
    tiny.logits(model, {**batch, "subspaces": CHOSEN})
    report = model.reft_report()
    assert report.subspaces == [("german",), None, ("instruct",), (), ("german", "instruct")]
    assert "subspaces: german, all, instruct, none, german+instruct" in str(report)
    assert [len(columns) for columns in report.edits[0].columns] == [5, 5, 5, 0, 5]
    tiny.logits(model, batch)
    assert model.reft_report().subspaces is None and "subspaces" not in str(model.reft_report())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["german"], "subspaces has 1 entries; it must have one a sample, here 5"),
        ("french", "subspaces names 'french'; the adapter 'default' has the subspaces german, instruct"),
        ([2] * 5, "subspaces names 2; the adapter 'default' has the subspaces german, instruct"),
        ([0.5] * 5, r"subspaces has 0\.5 for a sample"),
        (7, "subspaces is a int; it must have one entry a sample"),
    ],
)
@pytest.mark.parametrize("call", ["forward", "generate"])
def test_wrong_ones(call, given, message):
    model, batch = made(tiny.make("llama")), batch_of()
    run = model if call == "forward" else model.generate
    with pytest.raises(ValueError, match=message):
        run(**batch, subspaces=given)
    assert tiny.logits(model, batch).isfinite().all()


def test_training_says_which():
    model, batch = made(tiny.make("llama")).train(), batch_of()
    labels = torch.where(torch.arange(9) < 6, -100, batch["input_ids"])
    with pytest.raises(
        ValueError, match="this forward in training has no subspaces, and the adapter has groups of rows"
    ):
        model(**batch, labels=labels)
    with pytest.raises(ValueError, match="edits nothing: subspaces leaves every sample without a row"):
        model(**batch, labels=labels, subspaces=[[]] * 5)
    model(**batch, labels=labels, subspaces=[None] * 5).loss.backward()
    plain = made(tiny.make("llama"), subspaces=None).train()
    plain(**batch, labels=labels).loss.backward()  # without groups rows are what numbers count, and nobody needs to say
    plain(**batch, labels=labels, subspaces=[[0, 5]] * 5).loss.backward()


def test_a_compiled_model_refuses():
    model = torch.compile(made(tiny.make("llama", num_hidden_layers=1)), backend="eager")
    with pytest.raises(RuntimeError, match="subspaces is for a model that is not compiled"), torch.no_grad():
        model(**batch_of(), subspaces="german")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"subspaces": [[0], [6]]}, "subspaces gives '1' the row 6; r is 6"),
        ({"subspaces": {"a": [0], "b": [0]}}, "subspaces has the row 0 in 'a' and in 'b'"),
        ({"subspaces": 3}, "subspaces is 3; it must be groups of rows"),
        ({"subspaces": {"a": "0-3"}}, "subspaces gives 'a' '0-3'"),
    ],
)
def test_configurations(settings, message):
    with pytest.raises(ValueError, match=message):
        ReftConfig(r=6, **settings)


def test_the_reference_agrees_on_a_groups_rows():
    """The identity start is one of every group: W_S h + b_S - R_S h = 0."""
    model = made(tiny.make("llama"), init_weights="identity")
    batch = batch_of()
    with model.disable_adapter():
        wanted = tiny.logits(model, batch)
    assert torch.equal(tiny.logits(model, {**batch, "subspaces": CHOSEN}), wanted)
    R, W, b = tiny.adapter_weights(model)[0]
    h = torch.randn(3, tiny.WIDTH)
    torch.testing.assert_close(reference.loreft(h, R[:3], W[:3], b[:3]), h)
