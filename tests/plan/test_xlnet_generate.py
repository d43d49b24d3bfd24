"""XLNet's generation: a dummy token at the end, and mems after which the last two tokens are run again."""

import pytest
import torch
import transformers
from recomputed import SHOWN, prompts

from fastreft import ReftConfig, get_reft_model, reference


def make():
    torch.manual_seed(0)
    sizes = dict(vocab_size=61, d_model=32, n_layer=3, n_head=4, d_inner=48, initializer_range=0.2, dropout=0.0)
    return transformers.XLNetLMHeadModel(transformers.XLNetConfig(**sizes, pad_token_id=0)).eval()


def edit_columns(model, edits, chosen):
    """Edit the chosen columns of the whole sequence by the reference, wherever the forward starts."""

    def hook_of(m):
        def hook(_block, _args, kwargs, output):
            start = 0 if kwargs.get("mems") is None else len(kwargs["mems"])
            h = output[0].clone()
            for i, columns in enumerate(chosen):
                here = [s - start for s in columns if start <= s < start + len(h)]
                rows = torch.tensor(here, dtype=torch.long)
                h[here, i] = reference.edit_rows(h[:, i], rows, m.R, m.W, m.R, m.b)[here]
            return (h, *output[1:])

        return hook

    for layer, m in zip(model.transformer.layer, edits, strict=True):
        layer.register_forward_hook(hook_of(m), with_kwargs=True)


@pytest.mark.parametrize("use_mems", [False, True])
@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize(
    ("positions", "first", "last"), [("f2+l3", 2, 3), ("l1", 0, 1), ("prompt", 0, 9), ("d2", 0, 0), ("2:11", 2, 11)]
)
@torch.no_grad()
def test_greedy(positions, first, last, side, use_mems):
    model = get_reft_model(make(), ReftConfig(positions=positions))
    edits = [layer.reft.reft_edit["default"] for layer in model.get_base_model().transformer.layer]
    for m in edits:
        m.b.normal_().mul_(3)
    inputs, lengths = prompts(side)
    chosen = []
    for n in lengths:
        columns = list(range(9 - n, 9))
        if positions in ("d2", "2:11"):
            chosen.append([9, 10] if positions == "d2" else [*columns, *range(9, 15)][first:last])
            continue
        f = min(first, n // 2)
        chosen.append(columns[:f] + columns[n - min(last, n - f) :])
    plain = make()
    bare = plain.generate(**inputs, **SHOWN, use_mems=use_mems)
    edit_columns(plain, edits, chosen)
    wanted = plain.generate(**inputs, **SHOWN, use_mems=use_mems)
    found = model.generate(**inputs, **SHOWN, use_mems=use_mems)
    assert torch.equal(found.sequences, wanted.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(wanted.logits), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(torch.stack(bare.logits), torch.stack(wanted.logits), rtol=1e-3)
