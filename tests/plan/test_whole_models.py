"""Whole models recomputed within a backward: each forward is edited as the one of the first time that it stands for."""

import threading
from functools import partial

import pytest
import torch
from checkpoints import REENTRANT, gradients, labelled, made, same, step
from tiny import batch, make
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastreft import ReftConfig, get_reft_model


def at(column):
    return torch.tensor([[column, column + 1]] * 3)


def two_positions(model, inputs):
    first, second = (model(**inputs, reft_positions=at(k)).logits for k in (0, 2))
    return first.square().mean() + second.pow(3).mean()


def two_labels(model, inputs):
    first, second = (model(**inputs, reft_labels=labelled_from(inputs, k)).logits for k in (2, 3))
    return first.square().mean() + second.pow(3).mean()


def reference_then_policy(model, inputs):
    with torch.no_grad(), model.disable_adapter():
        reference = model(**inputs).logits
    return (model(**inputs).logits - reference).square().mean()


def policy_then_reference(model, inputs):
    policy = model(**inputs).logits
    with model.disable_adapter():
        return (policy - model(**inputs).logits).square().mean()


def two_adapters(model, inputs):
    model.set_adapter("default")
    first = model(**inputs).logits
    model.set_adapter("other")
    second = model(**inputs).logits
    model.set_adapter("default")
    return (first - 2 * second).square().mean()


def evaluated_then_trained(model, inputs):
    model.eval()
    with torch.no_grad():
        first = model(**inputs, reft_positions=at(4)).logits
    model.train()
    return (model(**inputs, reft_positions=at(1)).logits - first).square().mean()


def parts(model, inputs):
    """In memory that is used again."""
    pairs = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    shorter = [model(input_ids=ids[None].clone(), attention_mask=mask[None].clone()).logits for ids, mask in pairs]
    return sum((k + 1) * logits.square().mean() for k, logits in enumerate(shorter))


def labelled_from(inputs, start):
    labels = inputs["input_ids"].clone()
    labels[:, :start] = -100
    return labels


@REENTRANT
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "loss",
    [
        two_positions,
        two_labels,
        reference_then_policy,
        policy_then_reference,
        two_adapters,
        evaluated_then_trained,
        parts,
    ],
)
def test_several_forwards_in_one_checkpoint(loss, kind, reentrant):
    def run(recomputed):
        model = made(kind=kind)
        model.add_adapter("other", ReftConfig(r=2, positions="l2"))
        inputs, one = batch("right"), torch.ones((), requires_grad=True)

        def called(one):
            return one * loss(model, inputs)

        return gradients(model, lambda: checkpoint(called, one, use_reentrant=reentrant) if recomputed else called(one))

    wanted = run(False)
    assert sum(g.norm() for g in wanted.values()) > 0
    same(run(True), wanted)


@REENTRANT
def test_a_checkpoint_for_each_of_several_labels(reentrant):
    def run(recomputed):
        model, inputs, total = made(), batch("right", (9, 9, 9)), 0
        for start in (2, 5, 7):

            def loss(one, start=start):
                return one * model(**inputs, labels=labelled_from(inputs, start)).loss

            one = torch.ones((), requires_grad=True)
            total = total + (checkpoint(loss, one, use_reentrant=reentrant) if recomputed else loss(one))
        return gradients(model, lambda: total)

    same(run(True), run(False))


class Own(nn.Module):
    """Recomputes the model, ``deep`` checkpoints within each other, and keeps the labels for itself."""

    def __init__(self, lm, deep, reentrant):
        super().__init__()
        self.lm, self.deep, self.reentrant = lm, deep, reentrant

    def forward(self, input_ids, attention_mask, labels):
        def run(embeds):
            return self.lm(inputs_embeds=embeds, attention_mask=attention_mask, use_cache=False).logits

        for _ in range(self.deep):
            run = partial(checkpoint, run, use_reentrant=self.reentrant)
        logits = run(self.lm.get_input_embeddings()(input_ids).requires_grad_())
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def own(deep, reentrant):
    torch.manual_seed(2)
    return get_reft_model(Own(make("llama"), deep, reentrant), ReftConfig(r=3, positions="f2+l3")).train()


@REENTRANT
def test_the_same_tokens_with_other_labels_outside(reentrant):
    inputs = batch("right", (9, 9, 9))

    def loss(model):
        return sum(model(**inputs, labels=labelled_from(inputs, start)) for start in (2, 5, 7))

    plain, model = own(0, reentrant), own(1, reentrant)
    same(gradients(model, lambda: loss(model)), gradients(plain, lambda: loss(plain)))


@pytest.mark.parametrize("how", ["within each other", "evaluated"])
def test_labels_outside_of_a_forward_that_is_not_known(how):
    inputs = batch("right")
    model = own(2 if how == "within each other" else 1, True)
    if how == "evaluated":  # without gradients, where plans are not kept
        model(**inputs, labels=labelled(inputs)).backward()
        model.eval()
    losses = [model(**inputs, labels=labelled(inputs)) for _ in range(2)]
    with pytest.raises(
        RuntimeError, match=r"the forward that it belongs to is not known, of which its labels would be"
    ):
        sum(losses).backward()


def in_thread(call):
    done = []

    def run():
        try:
            done.append(call())
        except BaseException as error:
            done.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return done[0]


@REENTRANT
def test_forwards_of_several_threads(reentrant):
    model = made("mlp_output")
    wanted = gradients(model, lambda: step(model))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    same(in_thread(lambda: gradients(model, lambda: step(model))), wanted)  # one after another
    same(gradients(model, lambda: step(model)), wanted)
    losses = [in_thread(lambda side=side: step(model, side)) for side in ("left", "right")]
    with pytest.raises(RuntimeError, match="forwards of several threads may be the one it belongs to"):
        losses[0].backward()
    del losses
    same(gradients(model, lambda: step(model)), wanted)
