"""Our hooks count as none where a forward edits nothing, and only there: nobody else's is lost by it, and no edit."""

import copy
import pickle
import threading
from collections import OrderedDict

import pytest
import torch
from tiny import LAYERS, batch, blocks, hooks_on, logits, make

from fastreft import ReftConfig, get_reft_model

GREEDY = dict(do_sample=False, min_new_tokens=4, max_new_tokens=4)
SIDES = pytest.mark.parametrize("component", ["block_output", "block_input"])


def made(component="block_output", **config):
    torch.manual_seed(3)
    return get_reft_model(make("llama"), ReftConfig(component=component, task_type="CAUSAL_LM", **config)).eval()


def hooks(block, component):
    return block._forward_pre_hooks if component == "block_input" else block._forward_hooks


def truths(model, component, forward):
    """Whether the last block's hooks are true, within each forward of the model, and whether there are any."""
    block, seen = blocks(model)[-1], []
    handle = block.self_attn.register_forward_pre_hook(
        lambda *_: seen.append((bool(hooks(block, component)), len(hooks(block, component))))
    )
    forward()
    handle.remove()
    return seen


@SIDES
@pytest.mark.parametrize(("positions", "edits_steps"), [("f1+l2", False), ("all", True), ("decode", True)])
def test_they_are_false_in_a_step_that_edits_nothing(component, positions, edits_steps):
    model = made(component, positions=positions)
    seen = truths(model, component, lambda: model.generate(**batch(), **GREEDY))
    assert seen == [(True, 1), *[(edits_steps, 1)] * 3]
    assert hooks(blocks(model)[0], component)  # between forwards they say that a block by itself is not edited


@pytest.mark.parametrize(
    ("positions", "edited"),
    [("d1", [True, False, False]), ("d2", [True, True, False]), (":4", [False] * 3), ("11:", [False, False, True])],
)
def test_they_are_false_outside_a_window(positions, edited):
    """Of prompts of up to 9 tokens, none of fewer than 4: the three steps run the tokens 9 to 11 of the longest."""
    model = made(positions=positions)
    assert truths(model, "block_output", lambda: model.generate(**batch("left"), **GREEDY)) == [
        (True, 1),
        *[(edits, 1) for edits in edited],
    ]


@SIDES
@pytest.mark.parametrize("cleared", [False, True])
def test_others_run_at_each_step(component, cleared):
    model, seen = made(component), []
    block = blocks(model)[0]
    ours = hooks(block, component)
    if cleared:  # as some take all hooks off: then one hook is there, and not ours
        ours.clear()
    if component == "block_input":
        handle = block.register_forward_pre_hook(lambda _m, args: seen.append(args[0].shape[1]))
    else:
        handle = block.register_forward_hook(lambda _m, _a, output: seen.append(output.shape[1]))
    model.generate(**batch(), **GREEDY)
    assert seen == [9, 1, 1, 1]
    handle.remove()
    assert len(ours) == (0 if cleared else 1)


def test_a_forward_edits_while_another_thread_decodes():
    model, written = made(), []
    wanted = logits(model, batch())

    def decode(*_):  # in the middle of the forward, whole
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=lambda: written.append(model.generate(**batch("right"), **GREEDY)))
            thread.start()
            thread.join()

    handle = blocks(model)[0].self_attn.register_forward_pre_hook(decode)
    assert torch.equal(logits(model, batch()), wanted)
    handle.remove()
    assert torch.equal(written[0], model.generate(**batch("right"), **GREEDY))


@SIDES
def test_blocks_compiled_with_nothing_to_do_edit_a_prompt(component):
    model, taken = made(component), {}
    inner = model.get_base_model().model
    handle = inner.register_forward_pre_hook(lambda _m, _a, kwargs: taken.update(kwargs), with_kwargs=True)
    wanted = logits(model, batch() | {"use_cache": False})
    handle.remove()
    torch._dynamo.reset()
    inner.forward = torch.compile(inner.forward, backend="eager")
    with torch.no_grad():
        inner.forward(**taken)  # past the model's hooks: no plan
    torch.testing.assert_close(logits(model, batch() | {"use_cache": False}), wanted)


@SIDES
def test_a_copy_has_its_own(component):
    model = made(component)
    twin = copy.deepcopy(model)
    assert hooks_on(twin) == hooks_on(model)
    assert truths(twin, component, lambda: twin.generate(**batch(), **GREEDY)) == [(True, 1), *[(False, 1)] * 3]
    assert torch.equal(logits(twin, batch()), logits(model, batch()))
    base = twin.unload()
    assert hooks_on(base) == 0 and len(hooks(blocks(model)[0], component)) == 1
    assert all(type(hooks(module, component)) is OrderedDict for module in base.modules())

    ours = hooks(blocks(model)[0], component)
    assert len(pickle.loads(pickle.dumps(ours))) == len(ours.copy()) == 1


def test_hooks_that_were_there_keep_their_handles():
    base, seen = make("llama"), []
    handles = [block.register_forward_hook(lambda *_: seen.append(1)) for block in blocks(base)]
    plain = logits(base, batch())
    model = get_reft_model(base, ReftConfig())
    assert not torch.equal(logits(model, batch()), plain) and len(seen) == 2 * LAYERS
    for handle in handles:
        handle.remove()
    logits(model, batch())
    assert len(seen) == 2 * LAYERS
