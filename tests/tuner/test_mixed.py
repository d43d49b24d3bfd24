"""A batch of many adapters, ``adapter_names=``: each sample as by its adapter alone, bit for bit on a CPU."""

import pytest
import tiny
import torch
import transformers

from fastreft import ReftConfig, get_reft_model
from fastreft.tuner.layer import ReftLayer

NAMES = ["ada", "bob", "__base__", "cid", "ada"]


def with_three(base):
    """Three adapters of other kinds, ranks, layers and positions."""
    torch.manual_seed(0)
    common = {"init_weights": "random"}
    model = get_reft_model(base, ReftConfig(r=4, positions="f2+l3", tied=False, **common), adapter_name="ada")
    model.add_adapter("bob", ReftConfig(r=3, positions="all", act_fn="relu", layers_to_transform=[0], **common))
    model.add_adapter("cid", ReftConfig(intervention_type="noreft", add_bias=True, r=5, positions="l1", **common))
    return model.eval()


def one_by_one(model, run):
    """What ``run()`` gives each sample with its adapter alone."""
    found = {}
    for name in dict.fromkeys(NAMES):
        if name == "__base__":
            with model.disable_adapter():
                found[name] = run()
        else:
            model.set_adapter(name)
            found[name] = run()
    return [found[name][i] for i, name in enumerate(NAMES)]


def batch_of(model):
    torch.manual_seed(1)
    ids = torch.randint(5, 60, (len(NAMES), 9))
    mask = torch.ones_like(ids)
    mask[1, :4] = mask[3, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module", params=["llama", "gpt2", "bert", "xlnet"])
def model(request):
    if request.param != "xlnet":
        return with_three(tiny.make(request.param))
    torch.manual_seed(0)  # its hidden states are (tokens, batch, d)
    config = transformers.XLNetConfig(vocab_size=61, d_model=32, n_layer=3, n_head=4, d_inner=48, dropout=0.0)
    return with_three(transformers.XLNetLMHeadModel(config))


def test_a_forward(model):
    batch = batch_of(model)

    def run(**more):
        with torch.no_grad():
            return model(**batch, **more)[0]

    mixed = run(adapter_names=NAMES)
    for own, alone in zip(mixed, one_by_one(model, run), strict=True):
        assert torch.equal(own, alone)


def test_with_gradients(model):
    """One adapter after the other then; the gradients are those of each alone."""
    batch = batch_of(model)

    def gradients(**more):
        model.zero_grad()
        model(**batch, **more)[0][3].square().sum().backward()
        return {
            name: p.grad.clone() for name, p in model.named_parameters() if ".cid." in name or name.endswith(".cid")
        }

    model.set_adapter("cid")
    alone = gradients()
    for name, gradient in gradients(adapter_names=NAMES).items():
        assert gradient.abs().sum() > 0
        torch.testing.assert_close(gradient, alone[name], msg=name)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
def test_generation(options):
    model = with_three(tiny.make("llama"))
    batch = batch_of(model)
    count = options.get("num_return_sequences", 1)

    def run(**more):
        torch.manual_seed(3)
        out = model.generate(**batch, **{"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0} | options, **more)
        return out.view(len(NAMES), count, -1)

    for own, alone in zip(run(adapter_names=NAMES), one_by_one(model, run), strict=True):
        if not options.get("do_sample"):  # the others' probabilities move the dice
            length = min(own.shape[-1], alone.shape[-1])
            assert torch.equal(own[..., :length], alone[..., :length])


def test_a_changed_adapter_is_seen():
    model = with_three(tiny.make("llama"))
    batch = batch_of(model)
    with torch.no_grad():
        before = model(**batch, adapter_names=NAMES)[0]
        for name, parameter in model.named_parameters():
            if ".ada." in name and name.endswith(".b"):
                parameter.add_(1)
        after = model(**batch, adapter_names=NAMES)[0]
        model.set_scale(0.5, "ada")
        halved = model(**batch, adapter_names=NAMES)[0]
        model.set_adapter("ada")
        assert torch.equal(halved[0], model(**batch)[0][0]) and not torch.equal(halved[0], after[0])
        edits = next(module for module in model.modules() if isinstance(module, ReftLayer)).interventions("bob")
        edits[0].b = torch.nn.Parameter(edits[0].b + 1)
        replaced = model(**batch, adapter_names=NAMES)[0]
        model.set_adapter("bob")
        assert torch.equal(replaced[1], model(**batch)[0][1]) and not torch.equal(replaced[1], after[1])
    assert [not torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [name == "ada" for name in NAMES]
    model.delete_adapter("cid")
    with pytest.raises(ValueError, match="'cid'; the model's ReFT adapters are ada, bob"):
        model(**batch, adapter_names=NAMES)


def test_heads_of_their_own():
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=90, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    model = get_reft_model(
        transformers.BertForSequenceClassification(config),
        ReftConfig(task_type="SEQ_CLS", r=2, init_weights="random"),
        "ada",
    )
    model.add_adapter("bob", ReftConfig(task_type="SEQ_CLS", r=2, init_weights="random"))
    for name, parameter in model.named_parameters():
        if "modules_to_save.bob" in name:
            torch.nn.init.normal_(parameter)
    model.eval()
    ids = torch.randint(5, 80, (3, 7))
    with torch.no_grad():
        mixed = model(ids, adapter_names=["ada", "bob", "ada"]).logits
        for name, places in (("ada", [0, 2]), ("bob", [1])):
            model.set_adapter(name)
            torch.testing.assert_close(mixed[places], model(ids).logits[places])


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["ada", "bob"], "has 2 names; it must have one a sample, here 5"),
        (["ada"], "has 1 names"),
        ("ada", "must be a list of names"),
        ([*NAMES[:4], "eve"], "holds 'eve'"),
    ],
)
def test_what_is_refused(names, said):
    model = with_three(tiny.make("llama"))
    with torch.no_grad():
        with pytest.raises(ValueError, match=said):
            model(**batch_of(model), adapter_names=names)
        with pytest.raises(ValueError, match=said):
            model.generate(**batch_of(model), adapter_names=names, max_new_tokens=2)
    with pytest.raises(ValueError, match="training mode"):
        model.train()(**batch_of(model), adapter_names=NAMES)
