"""Models within somebody's modules: each call of the innermost of Transformers' models is edited by its own inputs."""

import pytest
import torch
import transformers
from tiny import adapter_weights, batch, columns, hooked, make
from torch import nn
from torch.nn import functional as F

from fastreft import ReftConfig, get_reft_model

SIDES = pytest.mark.parametrize("side", ["left", "right"])


class Renamed(nn.Module):
    """Calls the model within by its own names, and takes other ones."""

    def __init__(self, inner):
        super().__init__()
        self.backbone = inner

    def forward(self, tokens, mask):
        return self.backbone(input_ids=tokens, attention_mask=mask)[0]


class OwnLoss(nn.Module):
    """Takes the labels itself; ``within`` names the model."""

    def __init__(self, inner):
        super().__init__()
        self.lm = inner

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.lm(input_ids=input_ids, attention_mask=attention_mask).logits
        loss = None if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"loss": loss, "logits": logits}


class Twice(nn.Module):
    """Two texts a forward, as those who compare do."""

    def __init__(self, inner):
        super().__init__()
        self.encoder = inner

    def forward(self, a, b):
        return self.encoder(**a)[0], self.encoder(**b)[0]


class Split(nn.Module):
    """A batch in parts."""

    def __init__(self, inner):
        super().__init__()
        self.lm = inner

    def forward(self, input_ids, attention_mask):
        parts = zip(input_ids.split(1), attention_mask.split(1), strict=True)
        return torch.cat([self.lm(ids, attention_mask=mask).logits for ids, mask in parts])


def adapted(wrapper, positions="f2+l3"):
    """A wrapper round an edited model, the plain model in it and the weights of its edits."""
    torch.manual_seed(2)
    model = get_reft_model(wrapper, ReftConfig(positions=positions, r=3))
    for name, p in model.named_parameters():
        if name.endswith(".b"):
            p.data = 3 * torch.randn_like(p)
    return model


def edits(inner):
    """The weights of the edits on a model of ``tiny.make`` and of those on the model without its head."""
    return adapter_weights(inner)


def labels_of(inputs, answer=3):
    """Labels of the last shown tokens."""
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    for row, mask in zip(labels, inputs["attention_mask"], strict=True):
        shown = mask.nonzero().flatten()
        row[shown[:-answer]] = -100
    return labels


@SIDES
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_renamed_arguments(kind, side):
    inputs = batch(side)
    plain, inner = make(kind), make(kind)
    model = adapted(Renamed(inner))
    with torch.no_grad(), hooked(plain, edits(inner), columns(inputs["attention_mask"], 2, 3)):
        wanted = plain(**inputs)[0]
    with torch.no_grad():
        found = model(inputs["input_ids"], inputs["attention_mask"])
    shown = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[shown], wanted[shown])


@SIDES
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_labels_that_a_module_keeps_for_its_own_loss(kind, side):
    inputs = batch(side)
    labels = labels_of(inputs)
    plain, inner = make(kind), make(kind)
    model = adapted(OwnLoss(inner)).train()
    chosen = columns(inputs["attention_mask"], 2, 3, labels.tolist())
    with torch.no_grad(), hooked(plain, edits(inner), chosen):
        wanted = plain(**inputs, labels=labels)
    found = model(**inputs, labels=labels)
    torch.testing.assert_close(found["loss"], wanted.loss)
    torch.testing.assert_close(
        found["logits"][inputs["attention_mask"].bool()], wanted.logits[inputs["attention_mask"].bool()]
    )


@pytest.mark.parametrize("settings", [{}, {"use_cache": False}, {"prefill_chunk_size": 3}, {"num_beams": 2}])
def test_generate_of_a_model_within(settings):
    inputs = batch("left")
    whole, inner = make("llama"), make("llama")
    reference = adapted(whole)
    model = adapted(OwnLoss(inner))
    wanted = reference.generate(**inputs, max_new_tokens=4, do_sample=False)
    if "num_beams" in settings:
        wanted = reference.generate(**inputs, max_new_tokens=4, do_sample=False, **settings)
    assert torch.equal(
        model.base_model.model.lm.generate(**inputs, max_new_tokens=4, do_sample=False, **settings), wanted
    )


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_two_calls_in_a_forward_have_a_plan_each(kind):
    a, b = batch("left"), batch("right", (3, 8, 5), 8)
    plain, inner = make(kind), make(kind)
    model = adapted(Twice(inner))
    with torch.no_grad():
        found = model(a, b)
        for inputs, out in zip((a, b), found, strict=True):
            with hooked(plain, edits(inner), columns(inputs["attention_mask"], 2, 3)):
                wanted = plain(**inputs)[0]
            shown = inputs["attention_mask"].bool()
            torch.testing.assert_close(out[shown], wanted[shown])


def test_a_batch_in_parts():
    inputs = batch("left")
    plain, inner = make("llama"), make("llama")
    model = adapted(Split(inner))
    with torch.no_grad(), hooked(plain, edits(inner), columns(inputs["attention_mask"], 2, 3)):
        wanted = plain(**inputs).logits
    with torch.no_grad():
        found = model(**inputs)
    torch.testing.assert_close(found[inputs["attention_mask"].bool()], wanted[inputs["attention_mask"].bool()])


def test_two_models_in_a_list_and_a_compiled_one():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.models = nn.ModuleList([make("llama"), make("llama")])

        def forward(self, x, y):
            return self.models[0](**x).logits, self.models[1](**y).logits

    model = adapted_targets(Pair())
    a, b = batch("left"), batch("right", (3, 8, 5), 8)
    with torch.no_grad():
        found = model(a, b)
        for i, (inputs, out) in enumerate(zip((a, b), found, strict=True)):
            inner, plain = model.base_model.model.models[i], make("llama")
            with hooked(plain, edits(inner), columns(inputs["attention_mask"], 2, 3)):
                wanted = plain(**inputs).logits
            shown = inputs["attention_mask"].bool()
            torch.testing.assert_close(out[shown], wanted[shown])


def adapted_targets(wrapper):
    torch.manual_seed(2)
    wrapper.config = wrapper.models[0].config
    return get_reft_model(wrapper, ReftConfig(positions="f2+l3", r=3, target_modules=r".*\.layers\.\d+"))


def test_a_compiled_model_generates():
    inputs = batch("left")
    wanted = adapted(make("llama")).generate(**inputs, max_new_tokens=3, do_sample=False)
    model = adapted(torch.compile(make("llama"), backend="eager"))
    assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), wanted)


@pytest.mark.parametrize("cached", [True, False])
def test_a_callback_that_asks_the_model_itself(cached):
    inputs, other = batch("left"), batch("right", (3, 8, 5), 8)
    model, seen = adapted(make("llama")), []

    def ask(ids, scores, **_):
        seen.append(model(**other, use_cache=False).logits)
        seen.append(model(input_ids=ids[:, :5], use_cache=False).logits)
        return False

    with torch.no_grad():
        wanted = model(**other, use_cache=False).logits
        settings = {"max_new_tokens": 3, "do_sample": False, "use_cache": cached}
        text = model.generate(**inputs, **settings)
        assert torch.equal(model.generate(**inputs, **settings, stopping_criteria=[ask]), text)
        assert all(torch.equal(logits, wanted) for logits in seen[::2])
        start = model(input_ids=text[:, :5], use_cache=False).logits
    torch.testing.assert_close(seen[1], start)


class Chat(nn.Module):
    """Has the model within it generate, as models of images and text do."""

    main_input_name = "input_ids"

    def __init__(self, inner):
        super().__init__()
        self.language_model, self.config, self.generation_config = inner, inner.config, inner.generation_config

    def can_generate(self):
        return True

    def generate(self, **inputs):
        return self.language_model.generate(**inputs)


def test_explicit_positions_reach_the_model_that_generates():
    inputs, columns = batch("left"), torch.tensor([[5, 8]])
    whole = adapted(make("llama"))
    settings = {"max_new_tokens": 3, "do_sample": False, "reft_positions": columns.expand(3, 2)}
    model = adapted(Chat(make("llama")))
    assert torch.equal(model.base_model.model.generate(**inputs, **settings), whole.generate(**inputs, **settings))


def test_only_the_model_without_its_head(recwarn):
    inputs = batch("left")
    labels = labels_of(inputs)
    plain, outer = make("llama"), make("llama")
    torch.manual_seed(2)
    outer.model = get_reft_model(outer.model, ReftConfig(positions="f2+l3", r=3))
    outer.train()
    with pytest.warns(UserWarning, match="no labels"):
        outer(**inputs, labels=labels)
    chosen = columns(inputs["attention_mask"], 2, 3, labels.tolist())
    weights = adapter_weights(outer.model.base_model)
    with hooked(plain, weights, chosen):
        wanted = plain(**inputs, labels=labels).loss
    torch.testing.assert_close(outer(**inputs, labels=labels, reft_labels=labels).loss, wanted)
    with pytest.raises(ValueError, match="the adapter is on a model without the head"), torch.no_grad():
        outer.eval().generate(**batch("right", (9, 9)), max_new_tokens=2, prefill_chunk_size=3)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_choices_are_samples(kind):

    if kind == "bert":
        base = transformers.BertForMultipleChoice(make("bert").config).eval()
    else:
        base = transformers.GPT2DoubleHeadsModel(make("gpt2").config).eval()
    one, two = batch("right"), batch("right", (5, 9, 3))
    inputs = {name: torch.stack([one[name], two[name]], 1) for name in one}
    model = adapted(base)
    with torch.no_grad():
        model(**inputs)
    report = model.reft_report()
    assert {edit.rows for edit in report.edits} == {sum(min(5, n) for n in (7, 4, 9, 5, 9, 3))}


def bart(head):
    shape = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in SIZES.items()}
    config = transformers.BartConfig(vocab_size=61, d_model=32, max_position_embeddings=40, num_labels=3, **shape)
    config.pad_token_id, config.eos_token_id, config.bos_token_id, config.decoder_start_token_id = 0, 2, 1, 2
    torch.manual_seed(0)
    return getattr(transformers, f"BartFor{head}")(config)


SIZES = {"layers": 2, "attention_heads": 2, "ffn_dim": 48}
BOTH = r".*(encoder|decoder)\.layers\.\d+"


class OwnDecoding(nn.Module):
    """Shifts the labels and computes the loss itself."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, source, mask, labels=None):
        begun = torch.cat([torch.full_like(labels[:, :1], 2), labels[:, :-1].clamp(min=0)], 1)
        return self.inner(input_ids=source, attention_mask=mask, decoder_input_ids=begun).logits


def test_the_decoders_labels_of_somebodys_module():
    ids = torch.randint(3, 61, (3, 9))
    labels = torch.randint(3, 61, (3, 6))
    labels[:, :3] = -100
    config = ReftConfig(r=2, positions="f1+l1", target_modules=BOTH)
    model = get_reft_model(OwnDecoding(bart("ConditionalGeneration")), config).train()
    model(ids, torch.ones_like(ids), labels=labels)
    columns = {edit.layer.split(".")[-3]: edit.columns for edit in model.reft_report().edits}
    assert columns == {
        "encoder": [[0, 8]] * 3,
        "decoder": [[0, 3]] * 3,
    }  # the start token, and what is given of the answer


def test_the_classes_of_an_encoder_decoder_are_no_answer():
    ids = torch.full((3, 9), 5)
    ids[:, -1] = 2
    model = get_reft_model(
        bart("SequenceClassification"), ReftConfig(r=2, positions="f1+l1", target_modules=BOTH)
    ).train()
    assert torch.isfinite(
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=torch.tensor([0, 1, 2])).loss
    )
    assert all(edit.columns == [[0, 8]] * 3 for edit in model.reft_report().edits)
