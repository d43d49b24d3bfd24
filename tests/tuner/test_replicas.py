"""``torch.nn.DataParallel``, with replicas made by hand: their parameters are plain attributes, each runs in its own thread."""

import threading

import pytest
import torch
from tiny import batch, make

from fastreft import ReftConfig, get_reft_model
from fastreft.interventions import INTERVENTIONS


def replica_of(model):
    """What ``torch.nn.parallel.replicate`` makes, on one device: parameters that are no leaves, in the originals' graph."""
    modules = list(model.modules())
    copies = {module: module._replicate_for_data_parallel() for module in modules}
    for module, copy in copies.items():
        for name, child in module._modules.items():
            copy._modules[name] = None if child is None else copies[child]
        for name, p in module._parameters.items():
            setattr(copy, name, None if p is None else p * 1) if p is not None else copy._parameters.update(
                {name: None}
            )
        for name, buffer in module._buffers.items():
            copy._buffers[name] = buffer
    return copies[model]


def labelled(inputs):
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, :6] = -100
    return labels


@pytest.mark.parametrize("kind", list(INTERVENTIONS))
@pytest.mark.parametrize("threads", [False, True])
def test_replicas_are_edited_and_their_gradients_reach_the_model(kind, threads):
    torch.manual_seed(0)
    model = get_reft_model(make("llama"), ReftConfig(r=2, positions="f2+l3", intervention_type=kind)).train()
    inputs = batch("left", (7, 8, 9, 9))
    labels = labelled(inputs)
    whole = model(**inputs, labels=labels, use_cache=False).logits
    whole.square().sum().backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    replicas, found = [replica_of(model) for _ in range(2)], [None, None]
    grad = torch.is_grad_enabled()

    def run(i):
        with torch.set_grad_enabled(grad):
            part = {name: value[2 * i : 2 * i + 2] for name, value in inputs.items()}
            found[i] = replicas[i](**part, labels=labels[2 * i : 2 * i + 2], use_cache=False).logits

    if threads:
        workers = [threading.Thread(target=run, args=(i,)) for i in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    else:
        run(0)
        run(1)
    torch.testing.assert_close(torch.cat(found), whole)
    torch.cat(found).square().sum().backward()
    for name, p in model.named_parameters():
        if name in wanted:
            torch.testing.assert_close(p.grad, wanted[name], atol=1e-4, rtol=1e-4)
