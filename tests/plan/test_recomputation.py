"""Blocks recomputed within a backward, whoever does it, have the plan and the adapters of their own forward."""

import functools

import pytest
import torch
from checkpoints import REENTRANT, gradients, labelled, made, same, step
from drop_in import at, model_of
from peft import LoraConfig, inject_adapter_in_model
from tiny import batch, blocks, make
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from transformers import PretrainedConfig

from fastreft import ReftConfig, get_reft_model
from fastreft.plan.past import KEPT

COMPONENTS = pytest.mark.parametrize("component", ["block_output", "block_input", "mlp_output", "attention_output"])


def wrap(model, kind, reentrant):
    """Have torch's wrapper, as FSDP uses it, round every module of a kind."""
    made = functools.partial(
        checkpoint_wrapper, checkpoint_impl=CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
    )
    apply_activation_checkpointing(model, checkpoint_wrapper_fn=made, check_fn=lambda module: type(module) is kind)


def wrap_blocks(model, reentrant):
    wrap(model, type(blocks(model)[0]), reentrant)


@COMPONENTS
@REENTRANT
@pytest.mark.parametrize("where", ["block", "part"])
def test_torchs_wrapper(component, reentrant, where):
    model = made(component)
    wanted = gradients(model, lambda: step(model))
    wrap(model, type(blocks(model)[0]) if where == "block" else type(blocks(model)[0].mlp), reentrant)
    same(gradients(model, lambda: step(model)), wanted)


@REENTRANT
def test_wrappers_within_wrappers(reentrant):
    model = made("mlp_output")
    wanted = gradients(model, lambda: step(model))
    for kind in (type(blocks(model)[0].mlp), type(blocks(model)[0])):
        wrap(model, kind, reentrant)
    same(gradients(model, lambda: step(model)), wanted)


@REENTRANT
def test_two_forwards_before_one_backward(reentrant):
    model = made()
    wanted = gradients(model, lambda: step(model) + 2 * step(model, "right"))
    wrap_blocks(model, reentrant)
    same(gradients(model, lambda: step(model) + 2 * step(model, "right")), wanted)


@REENTRANT
def test_a_whole_model_whose_labels_are_outside(reentrant):
    class Own(nn.Module):
        def __init__(self, lm, recompute):
            super().__init__()
            self.lm, self.recompute = lm, recompute

        def forward(self, input_ids, attention_mask, labels):
            def run(embeds):
                return self.lm(inputs_embeds=embeds, attention_mask=attention_mask, use_cache=False).logits

            embeds = self.lm.get_input_embeddings()(input_ids)
            logits = checkpoint(run, embeds, use_reentrant=reentrant) if self.recompute else run(embeds)
            return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    def run(recompute):
        torch.manual_seed(2)
        base = make("llama")
        base.enable_input_require_grads()
        model = get_reft_model(Own(base, recompute), ReftConfig(r=3, positions="f2+l3")).train()
        inputs = batch("left")
        return gradients(model, lambda: model(**inputs, labels=labelled(inputs)))

    same(run(True), run(False))


@COMPONENTS
@pytest.mark.parametrize("how", ["switched", "disabled", "enabled"])
@pytest.mark.parametrize("by", ["reentrant", "not reentrant", "transformers", "transformers, reentrant"])
def test_adapters_switched_before_the_backward(component, how, by):
    def run(recomputed):
        model = made(component)
        torch.manual_seed(5)
        model.add_adapter("other", ReftConfig(r=2, positions="l2", component=component))
        model.base_model.set_adapter("default")
        model.requires_grad_(False)
        for name, p in model.named_parameters():
            p.requires_grad_("reft_" in name)
        if recomputed and by.startswith("transformers"):
            model.gradient_checkpointing_enable({"use_reentrant": "," in by})
        elif recomputed:
            wrap_blocks(model, by == "reentrant")
        if how == "enabled":
            with model.disable_adapter():
                loss = step(model) + 0 * model.get_input_embeddings().weight.sum()
        else:
            loss = step(model)
        if how == "switched":
            for layer in (m for m in model.modules() if hasattr(m, "specs")):
                layer._active_adapter = ["other"]
        elif how == "disabled":
            for layer in (m for m in model.modules() if hasattr(m, "specs")):
                layer._disable_adapters = True
        if how == "enabled":
            loss.requires_grad or loss.requires_grad_()
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    same(run(True), run(False))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(x).tanh()


def test_checkpoint_sequential_of_custom_blocks():
    class Stack(nn.Module):
        def __init__(self, segments):
            super().__init__()
            torch.manual_seed(0)
            self.config = PretrainedConfig(hidden_size=8)
            self.blocks = nn.ModuleList(Block() for _ in range(4))
            self.segments = segments

        def forward(self, inputs_embeds, attention_mask=None):
            if self.segments:
                return checkpoint_sequential(list(self.blocks), self.segments, inputs_embeds, use_reentrant=False)
            for block in self.blocks:
                inputs_embeds = block(inputs_embeds)
            return inputs_embeds

    def run(segments):
        model = Stack(segments)
        torch.manual_seed(1)
        model = get_reft_model(model, ReftConfig(r=2, positions="f1+l2", target_modules=r"blocks\.\d+")).train()
        x = torch.randn(3, 6, 8, requires_grad=True)
        return gradients(model, lambda: model(inputs_embeds=x).square().sum())

    same(run(2), run(0))


def test_a_recomputation_whose_forward_is_forgotten_is_refused():
    model = made()
    wrap_blocks(model, False)
    kept = []  # of the forward's graph, a part that its output does not keep
    handle = blocks(model)[-1].register_forward_hook(lambda _m, _a, output: kept.append(output))
    step(model)
    handle.remove()
    early = (kept[0] if isinstance(kept[0], torch.Tensor) else kept[0][0]).sum()
    with torch.no_grad():
        for _ in range(KEPT):
            step(model)
    with pytest.raises(
        RuntimeError, match="is recomputed within a backward, and the forward that it belongs to is not known"
    ):
        early.backward()


def test_lora_beside_it_is_recomputed_too():
    def run(reentrant):
        torch.manual_seed(0)
        base = make("llama")
        base.enable_input_require_grads()
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), base, "lora")
        model = get_reft_model(base, ReftConfig(r=3, positions="f2+l3"), "edit").train()
        for name, p in model.named_parameters():
            p.requires_grad_("lora_" in name or "reft_" in name)
        if reentrant is not None:
            wrap_blocks(model, reentrant)
        return gradients(model, lambda: step(model))

    wanted = run(None)
    for reentrant in (True, False):
        same(run(reentrant), wanted)


@REENTRANT
@pytest.mark.parametrize("original", [False, True])
def test_the_drop_in(reentrant, original):
    def run(wrapped):
        torch.manual_seed(2)
        model = model_of()
        model.model.enable_input_require_grads()
        model.train()
        if wrapped:
            wrap_blocks(model.model, reentrant)
        ids = batch("right")["input_ids"]

        def loss():
            where = {"unit_locations": at([0, 2, 3]), "labels": ids, "use_cache": False}
            plain, edited = model({"input_ids": ids}, **where, output_original_output=original)
            return edited.loss + (
                plain.logits.square().mean() if original else 0
            )  # which is recomputed, and not edited

        return gradients(model.interventions, loss)

    wanted = run(False)
    found = run(True)
    assert wanted and found.keys() == wanted.keys()
    for name, g in found.items():
        torch.testing.assert_close(g, wanted[name])
