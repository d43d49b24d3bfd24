"""Directions of a concept: found by three methods, told apart in texts, added to states, written into files."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from peft import PeftModel
from torch.nn import functional as F

from fastreft import ReftConfig, get_reft_model
from fastreft.concepts import (
    Direction,
    auroc,
    diff_mean,
    linear_probe,
    load_gguf,
    reft_r1,
    reps,
    save_gguf,
    states,
    vectors_of,
)
from fastreft.concepts.reps import SteeredVector, preference_loss

LAYER = 1
CONCEPT = 7  # a token that texts with the concept are full of


def texts(n: int, with_it: bool, seed: int = 0) -> list[list[int]]:
    """Random texts of odd lengths, with the concept's token in them, or without."""
    generator = torch.Generator().manual_seed(seed + with_it)
    found = []
    for i in range(n):
        text = torch.randint(10, tiny.VOCAB, (5 + i % 4,), generator=generator)
        if with_it:
            text[2::2] = CONCEPT
        found.append(text.tolist())
    return found


@pytest.fixture(scope="module")
def model():
    return tiny.make("llama")


def test_states_are_the_layers_outputs_whatever_the_padding(model):
    some = texts(5, True)
    model.train()
    tiny.blocks(model)[0].eval()
    found = list(states(model, LAYER, some, batch_size=2))
    reft_r1(model, LAYER, some, some, epochs=1)
    assert model.training
    assert not any(module.training for module in tiny.blocks(model)[0].modules())  # as it was
    assert tiny.blocks(model)[1].training
    model.eval()
    for own, text in zip(found, some, strict=True):
        with torch.no_grad():
            wanted = model(torch.tensor([text]), output_hidden_states=True).hidden_states[LAYER + 1][0, 1:]
        torch.testing.assert_close(own, wanted)


def test_the_difference_of_means(model):
    a, b = texts(6, True), texts(6, False)
    made = diff_mean(model, LAYER, a, b)
    rows = [torch.cat(list(states(model, LAYER, side))) for side in (a, b)]
    apart = rows[0].mean(0) - rows[1].mean(0)
    torch.testing.assert_close(made.vector, apart / apart.norm())
    assert made.largest == pytest.approx(float((rows[0] @ made.vector).max()), rel=1e-5)


def test_a_probe_is_at_the_bottom_of_its_loss(model):
    a, b = texts(8, True), texts(8, False)
    made = linear_probe(model, LAYER, a, b)
    rows = [torch.cat(list(states(model, LAYER, side))) for side in (a, b)]
    scale = torch.cat(rows).norm(dim=1).mean()
    wanted = torch.cat([torch.ones(len(rows[0])), torch.zeros(len(rows[1]))])

    def loss(length):
        logits = length * (torch.cat(rows) @ made.vector + made.bias) / scale
        return float(F.binary_cross_entropy_with_logits(logits, wanted) + 1e-3 * length**2)

    best = min((loss(n / 10), n / 10) for n in range(1, 400))
    assert best[0] < 0.6 * math.log(2)
    assert 0.5 < best[1] < 39


@pytest.mark.parametrize("find", [diff_mean, linear_probe])
def test_they_tell_texts_with_it_from_texts_without(model, find):
    made = find(model, 0, texts(40, True), texts(40, False))
    new = [made.scores(model, texts(40, with_it, seed=400)) for with_it in (True, False)]
    assert auroc(*new) > 0.9
    assert auroc(new[1], new[0]) == pytest.approx(1 - auroc(*new))


def test_auroc_counts_pairs():
    assert auroc([2.0, 1.0], [1.0, 0.0]) == (1 + 1 + 0.5 + 1) / 4
    with pytest.raises(ValueError, match="0 scores with the concept and 1 without"):
        auroc([], [1.0])


def test_reft_r1_is_the_papers_formula(model):
    """One step from the start: its gradient is that of the formula written out on a hook."""
    some = texts(3, True)
    labels = [[-100] * 3 + text[3:] for text in some]
    w = torch.full((tiny.WIDTH,), tiny.WIDTH**-0.5, requires_grad=True)
    length = max(map(len, some))
    ids = torch.tensor([text + [0] * (length - len(text)) for text in some])
    shown = torch.tensor([[1] * len(text) + [0] * (length - len(text)) for text in some])
    wanted = torch.tensor([own + [-100] * (length - len(own)) for own in labels])
    tokens = shown.bool()
    tokens[:, 0] = False

    def change(_module, _args, output):
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        latents = torch.relu(hidden @ w) * tokens
        hidden = hidden + tokens[..., None] * latents.topk(2, dim=1).values.mean(1)[:, None, None] * w
        return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])

    handle = tiny.blocks(model)[LAYER].register_forward_hook(change)
    loss = model(ids, attention_mask=shown, labels=wanted).loss
    handle.remove()
    (gradient,) = torch.autograd.grad(loss, w)
    said = []
    made = reft_r1(
        model, LAYER, some, labels, topk=2, epochs=1, batch_size=3, lr=1e-4, log=lambda i, x: said.append((i, x))
    )
    assert said == [(0, pytest.approx(float(loss)))]
    tangent = gradient - (gradient @ w) * w
    moved = (made.vector - w).detach()  # Adam's first step: against the gradient's sign, along the sphere
    assert F.cosine_similarity(moved, -tangent.sign(), dim=0) > 0.95
    assert made.vector.norm() == pytest.approx(1, abs=1e-6)


def test_reft_r1_learns_and_is_the_same_each_time(model):
    some = texts(12, True)
    labels = [[-100] * 2 + text[2:] for text in some]
    before = {name: p.clone() for name, p in model.named_parameters()}
    losses = []
    made = [
        reft_r1(model, LAYER, some, labels, epochs=15, batch_size=4, lr=0.05, log=lambda _, x: losses.append(x))
        for _ in range(2)
    ]
    assert torch.equal(made[0].vector, made[1].vector)
    assert sum(losses[-3:]) < sum(losses[:3]) - 0.15
    assert all(torch.equal(p, before[name]) and p.requires_grad for name, p in model.named_parameters())


def test_reps_loss_is_the_papers():
    """Of one pair by hand: an answer that the model would not give counts by how much less likely it is."""
    chosen, rejected, lengths = torch.tensor([-12.0]), torch.tensor([-6.0]), [torch.tensor([4]), torch.tensor([3])]
    for reference, beta in (([-20.0, -5.0], 15.0), ([-5.0, -20.0], 1.0)):
        margin = beta * -12.0 / 4 - -6.0 / 3
        got = preference_loss(chosen, rejected, lengths, [torch.tensor([r]) for r in reference])
        assert float(got) == pytest.approx(-math.log(1 / (1 + math.exp(-margin))))


def test_reps_edits_by_the_papers_formulas(model):
    edit = SteeredVector(tiny.WIDTH, 1, dtype=torch.float64)
    edit.c.data.fill_(0.3)
    h = torch.randn(2, 4, tiny.WIDTH, dtype=torch.float64)
    tokens = torch.tensor([[0, 1, 1, 1], [0, 1, 1, 0]]).bool()
    added, nulled = edit.change(h, tokens, 2.0), edit.change(h, tokens, 0.0)
    torch.testing.assert_close(added[tokens], (h + 2.3 * edit.v)[tokens])
    along = torch.relu(h @ edit.v + 0.3)[..., None] * edit.v / edit.v.norm() ** 2
    torch.testing.assert_close(nulled[tokens], (h - along)[tokens])
    for changed in (added, nulled):
        assert torch.equal(changed[~tokens], h[~tokens])


def test_reps_prefers_the_concept_when_added_and_not_when_nulled(model):
    prompts = [[11 + i, 20, 30] for i in range(6)]
    with_it = [[CONCEPT] * 4 for _ in prompts]
    without = [[40 + i, 41, 42, 43 + i] for i in range(6)]
    losses = []
    made = [
        reps(model, LAYER, prompts, with_it, without, epochs=12, batch_size=3, factors=(2, 4), lr=0.05,
             log=lambda _, x: losses.append(x))
        for _ in range(2)
    ]  # fmt: skip
    assert torch.equal(made[0].vector, made[1].vector)
    assert made[0].method == "reps"
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    steered = made[0].adapter(tiny.make("llama"), 4.0).eval()
    ids = torch.tensor(prompts)
    with torch.no_grad():
        after = steered(ids).logits[:, -1].log_softmax(-1)[:, CONCEPT]
        before = model(ids).logits[:, -1].log_softmax(-1)[:, CONCEPT]
    assert (after - before).mean() > 1


def test_a_direction_becomes_an_adapter_and_a_file(model, tmp_path):
    made = diff_mean(model, LAYER, texts(4, True), texts(4, False))
    made.save(tmp_path / "concept.safetensors")
    read = Direction.load(tmp_path / "concept.safetensors")
    assert torch.equal(read.vector, made.vector)
    assert (read.layer, read.bias, read.first, read.largest, read.method) == (LAYER, 0.0, 1, made.largest, "diff_mean")
    base = tiny.make("llama")
    batch = tiny.batch("right")

    def change(_module, _args, output):
        return output + 0.5 * made.largest * made.vector

    with torch.no_grad():
        bare = base(**batch).logits
        handle = tiny.blocks(base)[LAYER].register_forward_hook(change)
        wanted = base(**batch).logits
        handle.remove()
        steered = made.adapter(base, 0.5).eval()
        shown = batch["attention_mask"].bool()
        torch.testing.assert_close(steered(**batch).logits[shown], wanted[shown])
        with steered.reft(scale=0.0):
            assert torch.equal(steered(**batch).logits, bare)
    steered.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(tiny.make("llama"), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, steered(**batch).logits)


@pytest.mark.parametrize(
    ("make", "settings", "said"),
    [
        (lambda: Direction(torch.ones(7), 1), {}, r"vector is \(7,\) at layer 1; the model's hidden size is 32"),
        (lambda: Direction(torch.ones(tiny.WIDTH), 9), {}, "layer is 9"),
        (lambda: Direction(torch.ones(tiny.WIDTH), -1), {}, "layer is -1"),
        (lambda: Direction(torch.ones(tiny.WIDTH), 1), {"strength": math.nan}, "strength is nan"),
        (lambda: Direction(torch.ones(tiny.WIDTH), 1), {"strength": math.inf}, "strength is inf"),
    ],
)
def test_a_direction_that_does_not_fit_leaves_nothing(make, settings, said):
    base = tiny.make("llama")
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match=said):
        make().adapter(base, **settings)
    assert [name for name, _ in base.named_modules()] == names
    assert not hasattr(base, "peft_config")


def test_directions_are_active_beside_each_other(tmp_path):
    torch.manual_seed(0)
    first, second = (Direction(torch.randn(tiny.WIDTH), layer) for layer in (0, LAYER))
    batch = tiny.batch()
    with torch.no_grad():
        both = second.adapter(first.adapter(tiny.make("llama")), 2.0, adapter_name="second").eval()
        assert both.active_adapters == ["default", "second"]
        made = both(**batch).logits
        block = both.get_base_model().model.layers[LAYER]
        torch.testing.assert_close(block.reft.interventions("second")[0].v.data, 2.0 * second.vector)
        both.set_adapter("default")
        assert not torch.allclose(both(**batch).logits, made)
        with pytest.raises(ValueError, match="adapter_name is 'default', which an adapter of this model has"):
            second.adapter(both)
        with pytest.raises(ValueError, match="adapter_name is 'default', which an adapter of this model has"):
            second.adapter(both.get_base_model())
        assert both.active_adapters == ["default"]
        pytest.importorskip("gguf", reason="there is no gguf here")
        save_gguf(tmp_path / "v.gguf", {LAYER: 2.0 * second.vector}, "llama")
        loaded = load_gguf(tmp_path / "v.gguf", first.adapter(tiny.make("llama")), adapter_name="loaded").eval()
        torch.testing.assert_close(loaded(**batch).logits, made)


@pytest.mark.parametrize("find", [diff_mean, linear_probe])
def test_the_same_texts_are_no_direction(model, find):
    some = texts(4, True)
    for with_it, without in ((some, some * 2), (some, some[::-1])):
        with pytest.raises(ValueError, match="with_it and without have the same mean state at layer 1"):
            find(model, LAYER, with_it, without)


def test_a_strength_adds_the_direction_even_where_every_latent_is_below_0(model):
    """As of states that are far back along the direction, which is the same as without that."""
    sides = texts(4, True), texts(4, False)
    apart, moved = diff_mean(model, LAYER, *sides), tiny.make("llama")
    tiny.blocks(moved)[LAYER].register_forward_hook(lambda _m, _a, output: output - 100 * apart.vector)
    made = diff_mean(moved, LAYER, *sides)
    assert made.vector @ apart.vector > 0.99
    assert 0 < made.largest < 1e-3


def test_factors_may_be_a_tensor_and_texts_without_a_label_stand_alone(model):
    asked = ([[11, 20]], [[CONCEPT] * 3], [[40, 41]])
    made = [reps(model, LAYER, *asked, epochs=1, factors=given) for given in (torch.tensor([2.0, 4.0]), (2, 4))]
    assert torch.equal(made[0].vector, made[1].vector)
    some, losses = texts(2, True), []
    reft_r1(model, LAYER, some, [some[0], [-100] * len(some[1])], batch_size=1, log=lambda _, x: losses.append(x))
    assert all(map(math.isfinite, losses))


@pytest.mark.parametrize("settings", [{"component": "block_input"}, {"component": "mlp_output"},
                                      {"target_modules": r".*layers\.1\.mlp"}])  # fmt: skip
def test_what_is_no_blocks_output_is_no_control_vector(settings):
    config = ReftConfig(intervention_type="bias", positions="all", **settings)
    with pytest.raises(ValueError, match="is no single vector that is added to a block's output"):
        vectors_of(get_reft_model(tiny.make("llama"), config))


def test_control_vectors_there_and_back(tmp_path):
    gguf = pytest.importorskip("gguf", reason="there is no gguf here")
    model = get_reft_model(
        tiny.make("llama"),
        ReftConfig(
            task_type="CAUSAL_LM", intervention_type="lobireft", layers_to_transform=[1, 2], positions="all",
            init_weights="random",
        ),
    ).eval()  # fmt: skip
    vectors = vectors_of(model)
    save_gguf(tmp_path / "v.gguf", vectors, "llama")
    reader = gguf.GGUFReader(tmp_path / "v.gguf")
    assert {tensor.name for tensor in reader.tensors} == {"direction.1", "direction.2"}
    assert bytes(reader.get_field("controlvector.model_hint").parts[-1]) == b"llama"
    assert bytes(reader.get_field("general.architecture").parts[-1]) == b"controlvector"
    assert int(reader.get_field("controlvector.layer_count").parts[-1][0]) == 2
    loaded = load_gguf(tmp_path / "v.gguf", tiny.make("llama")).eval()
    batch = tiny.batch()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits)
    with pytest.raises(ValueError, match=r"of the layers \[0\]; a control vector has one layer at least, from 1 on"):
        save_gguf(tmp_path / "v.gguf", {0: torch.ones(4)}, "llama")
    assert vectors_of(loaded).keys() == {1, 2}
    (tmp_path / "bad.gguf").write_bytes(b"GGUF and nothing else")
    base = tiny.make("llama")
    for path, said in (
        (tmp_path / "bad.gguf", "is no GGUF file"),
        (tmp_path / "wide.gguf", "the model's hidden size is 32"),
    ):
        if path.name == "wide.gguf":
            save_gguf(path, {1: torch.ones(8)}, "llama")
        with pytest.raises(ValueError, match=said):
            load_gguf(path, base)
    assert not any("reft" in name for name, _ in base.named_modules())


@pytest.mark.parametrize(
    ("do", "said"),
    [
        (lambda m: diff_mean(m, 9, [[1, 2]], [[1, 2]]), "layer is 9"),
        (lambda m: diff_mean(m, 0, [[1]], [[1, 2]]), "with_it holds no text of more than 1 tokens"),
        (lambda m: list(states(m, 0, [[1, 2], []])), r"texts\[1\] is \[\]; a text is its token ids"),
        (lambda m: diff_mean(m, 0, "ships", [[1, 2]]), r"with_it is 'ships'; it must be a list of texts"),
        (lambda m: diff_mean(m, 0, [[1, 2]], ["fields"]), r"without\[0\] is 'fields'; a text is its token ids"),
        (lambda m: diff_mean(m, 0, [1, 2, 3], [[1, 2]]), r"with_it\[0\] is 1; a text is its token ids"),
        (lambda m: states(m, 0, [[1.5, 2.0]]), r"texts\[0\] is \[1.5, 2.0\]; a text is its token ids"),
        (lambda m: diff_mean(m, 0, [[1, 2]], [[3, 4]], first=-1), "first is -1; it must be an integer of at least 0"),
        (lambda m: states(m, 0, [[1, 2]], batch_size=0), "batch_size is 0; it must be an integer of at least 1"),
        (lambda m: diff_mean(m, -1, [[1, 2]], [[3, 4]]), "layer is -1; it must be the number of a layer"),
        (lambda m: linear_probe(m, -1, [[1, 2]], [[3, 4]]), "layer is -1; it must be the number of a layer"),
        (lambda m: reft_r1(m, -1, [[1, 2]], [[1, 2]]), "layer is -1; it must be the number of a layer"),
        (lambda m: reps(m, -1, [[1]], [[2]], [[3]]), "layer is -1; it must be the number of a layer"),
        (lambda m: reft_r1(m, 0, [[1, 2]], [[1, -100]]), "labels are -100 behind the first token of each text"),
        (lambda m: reft_r1(m, 0, [[1, 2]], [[1, 2]], topk=0), "topk is 0; it must be an integer of at least 1"),
        (lambda m: reft_r1(m, 0, [[1, 2]], [[1, 2]], epochs=0), "epochs is 0; it must be an integer of at least 1"),
        (lambda m: reft_r1(m, 0, [[1, 2]], [[1, 2]], batch_size=0), "batch_size is 0; it must be"),
        (lambda m: reps(m, 0, [[1]], [[2]], [[3]], epochs=0), "epochs is 0; it must be an integer of at least 1"),
        (lambda m: reps(m, 0, [[1]], [[]], [[3]]), r"with_it\[0\] is \[\]; a text is its token ids"),
        (lambda m: reps(m, 0, [[1]], [[2]], [[3]], factors=4), "factors is 4; it must be a list of finite numbers"),
        (lambda m: auroc([math.nan], [1.0]), "with_it holds a score that is NaN"),
        (lambda m: Direction(torch.ones(7), 0).scores(m, [[1, 2]]), r"vector is \(7,\) at layer 0; .* hidden size is 32"),
        (lambda m: save_gguf("no/v.gguf", {1: torch.full((4,), math.nan)}, "llama"), r"vectors\[1\] is \(4,\); .* finite"),
        (lambda m: reft_r1(m, 0, [[1, 2]], [[1]]), "each text with a label a token"),
        (lambda m: reps(m, 0, [[1]], [[2]], []), "must be as many, one at least"),
        (lambda m: reps(m, 0, [[1]], [[2]], [[3]], factors=(0,)), r"factors is \(0,\)"),
        (lambda m: Direction(torch.zeros(4), 0), "of length 0.0; it must be"),
        (lambda m: vectors_of(get_reft_model(tiny.make("llama"), ReftConfig())), "is no single vector"),
        (lambda m: Direction.load(__file__), "is no file of a direction"),
    ],
)  # fmt: skip
def test_refusals(model, do, said):
    with pytest.raises(ValueError, match=said):
        do(model)
