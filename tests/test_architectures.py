"""Every model type that Transformers maps to a head: attached, edited, trained, saved, disabled and made to generate.

The table that ``fastreft info --models`` prints is what these tests find: ``python tests/test_architectures.py`` writes it.
"""

from __future__ import annotations

import json
import re
import tempfile
import warnings
from collections import defaultdict
from typing import Any

import pytest
import torch
import transformers
import zoo
from peft import PeftModel
from torch import Tensor

from fastreft import ReftConfig, get_reft_model, layouts, reference
from fastreft.blocks import UNSUPPORTED, find_blocks
from fastreft.tasks.info import TABLE

# Classes that no tiny model of can be run here, by model type.
NOT_BUILT = {
    "blt": "its patches, of hashed byte groups, have no sizes that could be made small together",
    "gemma3n": "its vision tower needs timm and Pillow, which are not installed; gemma3n_text is tested",
    "gemma4_assistant": "it drafts from the states of another model and has no forward of its own",
    "gemma4_unified_assistant": "it drafts from the states of another model and has no forward of its own",
    "layoutlmv2": "it needs detectron2, which is not installed",
    "vibevoice_asr": "its speech tokenizers, 690 million parameters, have no sizes that could be made small",
    "voxtral_realtime": "it takes sound in step with its text, and no text alone",
}
# Classes whose generate is not run, by model type.
NO_GENERATION = {
    "minimax": "its cache is not recognised as one",
    "musicgen": "it writes from a sound's codes, not from a prompt of tokens",
    "musicgen_melody": "it writes from a sound's codes, not from a prompt of tokens",
    "rwkv": "its state is not recognised as a cache",
    "xlstm": "its state is not recognised as a cache",
}
FIRST, LAST = 2, 1
BY_TYPE: dict[str, dict[str, str]] = defaultdict(dict)
for _type, _kind, _name in zoo.classes():
    BY_TYPE[_type][_kind] = _name


def run(model: Any, given: dict[str, Tensor]) -> Tensor:
    """The logits, all random choices made alike."""
    torch.manual_seed(2)
    return model(**given).logits


def chosen(mask: Tensor, first: int = FIRST, last: int = LAST) -> set[tuple[int, int]]:
    """The (sample, column) pairs of f{first}+l{last}, by the paper's rule."""
    found = set()
    for b, row in enumerate(mask.tolist()):
        shown = [s for s, seen in enumerate(row) if seen]
        f, m = min(first, len(shown) // 2), min(last, -(-len(shown) // 2))
        found |= {(b, s) for s in shown[:f] + shown[len(shown) - m :]}
    return found


def first_tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


class Watched:
    """What each edit of a block found and left, by hooks that come before and after ours."""

    def __init__(self, modules: list[torch.nn.Module]):
        self.seen: list[tuple[torch.nn.Module, Tensor, Tensor]] = []
        self.before: list[Tensor] = []
        self.handles = []
        for module in modules:
            self.handles.append(module.register_forward_hook(self.note_before, prepend=True))
            self.handles.append(module.register_forward_hook(self.note_after))

    def note_before(self, _module: Any, _args: Any, output: Any) -> None:
        self.before.append(first_tensor(output).detach().clone())

    def note_after(self, module: Any, _args: Any, output: Any) -> None:
        self.seen.append((module, self.before.pop(), first_tensor(output).detach().clone()))

    def stop(self) -> None:
        for handle in self.handles:
            handle.remove()


def rows_wanted(layout: Any, hidden: Tensor, mask: Tensor) -> Tensor:
    """The rows of hidden.reshape(-1, d) to be edited, from the shapes alone."""
    batch, length = mask.shape
    lead = hidden.shape[:-1]
    found = []
    for b, s in chosen(mask):
        if layout is layouts.sequence_first:
            found.append(s * batch + b)
        elif layout is layouts.prefixed:
            found.append(b * lead[1] + lead[1] - length + s)
        elif layout is layouts.first_stream:
            found.append(b * lead[2] + s)
        elif layout is layouts.many_streams:
            found += [(b * length + s) * lead[2] + k for k in range(lead[2])]
        elif layout is layouts.streams_behind:
            found += [b * lead[1] + k * length + s for k in range(lead[1] // length)]
        else:
            found.append(b * lead[1] + s)
    return torch.tensor(sorted(found))


def check_edit(layer: Any, before: Tensor, after: Tensor, mask: Tensor) -> None:
    rows = rows_wanted(layer.layout, before, mask)
    m = layer.reft_edit["default"]
    changed = (before != after).flatten(0, -2).any(-1).nonzero().flatten()
    assert torch.equal(changed, rows)
    torch.testing.assert_close(after, reference.edit_rows(before, rows, m.R, m.W, m.R, m.b), rtol=1e-4, atol=1e-5)


def check_class(model_type: str, kind: str, folder: str) -> tuple[str, str]:
    """Everything, for one class; returns what its blocks are called and what told so."""
    base = zoo.build(model_type, kind, BY_TYPE[model_type][kind])
    given = zoo.inputs(base)
    mask = given["attention_mask"]
    base.requires_grad_(False)  # as PEFT does: some sums run in another order then
    with torch.no_grad():
        plain = run(base, given)
    found = find_blocks(base)
    model = get_reft_model(base, ReftConfig(positions=f"f{FIRST}+l{LAST}")).eval()
    # The edit: exactly the chosen rows, in every block, as the oracle has it.
    watched = Watched(found.modules)
    with torch.no_grad():
        edited = run(model, given)
    watched.stop()
    assert {id(module) for module, _, _ in watched.seen} == {id(module) for module in found.modules}
    for module, before, after in watched.seen:
        check_edit(module.reft, before, after, mask)
    assert not torch.equal(edited, plain)
    # Gradients reach every parameter of the adapter.
    model.train()
    run(model, given).float().square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and bool(parameter.grad.any()), name
    model.eval()
    # Disabled it is the base; taken off, saved and loaded it is the same adapter.
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(run(model, given), plain)
    model.save_pretrained(folder)
    base = model.unload()
    with torch.no_grad():
        assert torch.equal(run(base, given), plain)
        again = PeftModel.from_pretrained(base, folder).eval()
        assert torch.equal(run(again, given), edited)
    if kind in ("causal", "seq2seq") and base.can_generate() and model_type not in NO_GENERATION:
        check_generation(again, given)
    pattern = re.sub(r"\.\d+(?=\.|$)", ".*", found.names[0])
    return pattern, found.source


def check_generation(model: Any, given: dict[str, Tensor]) -> None:
    """With a cache as without one: the first tokens of a prompt stay the first as it grows."""
    given = {name: value for name, value in given.items() if not name.startswith("decoder_")}
    model.add_adapter("first", ReftConfig(positions=f"f{FIRST}"))
    model.set_adapter("first")
    cached, whole = generated(model, given)
    assert cached.shape == whole.shape
    if not torch.equal(cached, whole):  # some models' caches do not give what the whole sequence gives, edited or not
        with model.disable_adapter():
            assert not torch.equal(*generated(model, given))


def generated(model: Any, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What is written with a cache, and without one."""
    found = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        found.append(model.generate(**given, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=use_cache))
    return found[0], found[1]


def findings(model_type: str) -> dict[str, Any]:
    """The table's entry of a model type; an exception says what is wrong."""
    if model_type in NOT_BUILT:
        return {"why_not": NOT_BUILT[model_type]}
    if model_type in UNSUPPORTED:
        kind, name = next(iter(BY_TYPE[model_type].items()))
        with pytest.raises(ValueError, match=f"cannot be edited: {UNSUPPORTED[model_type]}"):
            get_reft_model(zoo.build(model_type, kind, name), ReftConfig())
        return {"why_not": UNSUPPORTED[model_type]}
    kinds: list[str] = []
    blocks: dict[str, str] = {}
    for kind in BY_TYPE[model_type]:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pattern, source = check_class(model_type, kind, folder)
        kinds.append(kind)
        blocks.setdefault(pattern, source)
    found = {"kinds": kinds, "blocks": sorted(blocks), "source": next(iter(blocks.values()))}
    return found | ({"generate": NO_GENERATION[model_type]} if model_type in NO_GENERATION else {})


@pytest.mark.parametrize("model_type", BY_TYPE)
def test_every_model_type(model_type):
    assert findings(model_type) == json.loads(TABLE.read_text())["models"][model_type]


def test_the_table_lists_every_type_and_enough_that_work():
    table = json.loads(TABLE.read_text())
    assert table["transformers"] == transformers.__version__
    assert table["models"].keys() == BY_TYPE.keys()
    assert sum("blocks" in entry for entry in table["models"].values()) >= 120


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    entries = {model_type: findings(model_type) for model_type in BY_TYPE}
    TABLE.write_text(json.dumps({"transformers": transformers.__version__, "models": entries}, indent=1) + "\n")
