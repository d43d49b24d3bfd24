"""Every model type that Transformers maps to a head: attached, edited, trained, saved, disabled and made to generate.

The table that ``fastreft info --models`` prints is what these tests find, and ``PYTHONPATH=tests/helpers python
tests/models/test_architectures.py`` writes.
"""

from __future__ import annotations

import json
import re
import tempfile
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo
from peft import PeftModel
from torch import Tensor

from fastreft import ReftConfig, get_reft_model, reference
from fastreft.models import layouts
from fastreft.models.blocks import UNSUPPORTED, find_blocks
from fastreft.tasks.info import TABLE, totals

_NO_CACHE = (
    "Transformers cannot build it: it wants the cache of all its layers shared, which its text config refuses",
    (ValueError, "layer types producing a cache is different"),
)
# Model types of which no tiny model can be built here -> why, and the error that says so.
NOT_BUILT: dict[str, tuple[str, tuple[type[Exception], str]]] = {
    "gemma3n": ("its vision tower needs timm, which is not installed; gemma3n_text is tested", (ImportError, "timm")),
    "gemma4_assistant": _NO_CACHE,
    "gemma4_unified_assistant": _NO_CACHE,
    "layoutlmv2": ("it needs detectron2, which is not installed", (ImportError, "detectron2")),
}
# Model types whose generate is not checked -> why.
NO_GENERATION = {"musicgen": "not checked: with a cache, Transformers runs only the last code of its prompt"}
# Model types that write something else with a cache than without one, edited or not: a growing number is looked into.
CACHE_DIFFERS = {"blt", "cpmant", "rwkv"}
DIFFERS = "checked against hooks: with a cache the bare model writes something else than without one"
GENERATE = ("causal", "seq2seq", "speech")  # the kinds of head whose generate is checked
FIRST, LAST = 2, 1
PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BY_TYPE: dict[str, dict[str, str]] = defaultdict(dict)
for _type, _kind, _name in zoo.classes():
    BY_TYPE[_type][_kind] = _name


def run(model: Any, given: dict[str, Tensor]) -> Tensor:
    """The logits, all random choices made alike."""
    torch.manual_seed(2)
    out = model(**given)
    return out.logits if "logits" in out else out[0]


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


def rows_wanted(layout: Any, hidden: Tensor, mask: Tensor, last: int = LAST) -> Tensor:
    """The rows of hidden.reshape(-1, d) to be edited, from the shapes alone."""
    batch, length = mask.shape
    lead = hidden.shape[:-1]
    found = []
    for b, s in chosen(mask, last=last):
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


def check_edit(layer: Any, before: Tensor, after: Tensor, mask: Tensor | None) -> None:
    if mask is None:
        mask = torch.ones(before.shape[:2])
    rows = rows_wanted(layer.layout, before, mask)
    m = layer.reft_edit["default"]
    changed = (before != after).flatten(0, -2).any(-1).nonzero().flatten()
    assert torch.equal(changed, rows)
    torch.testing.assert_close(after, reference.edit_rows(before, rows, m.R, m.W, m.R, m.b), rtol=1e-4, atol=1e-5)


def check_class(model_type: str, kind: str, folder: str) -> tuple[str, str, str]:
    """Everything, for one class; returns what its blocks are called, what told so, and what its ``generate`` does."""
    base = zoo.build(model_type, kind, BY_TYPE[model_type][kind])
    given = zoo.inputs(base)
    mask = given.get("attention_mask")
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
    generate = ""
    if kind in GENERATE and base.can_generate():
        generate = NO_GENERATION.get(model_type) or check_generation(again, found.modules, zoo.prompt(base))
    pattern = re.sub(r"\.\d+(?=\.|$)", ".*", found.names[0])
    return pattern, found.source, generate


def check_generation(model: Any, blocks: list[torch.nn.Module], given: dict[str, Tensor]) -> str:
    """With a cache as without one: the first tokens of a prompt stay the first as it grows.

    Some models' caches do not give what the whole sequence gives, edited or not; of them the cached text is compared
    with that of the bare model whose prompt is edited by hooks.
    """
    model.add_adapter("first", ReftConfig(positions=f"f{FIRST}"))
    model.set_adapter("first")
    cached, whole = generated(model, given)
    assert cached.shape == whole.shape
    if torch.equal(cached, whole):
        return "checked"
    with model.disable_adapter():
        assert not torch.equal(*generated(model, given))
        hooks = [block.register_forward_hook(EditsOnce(given["attention_mask"])) for block in blocks]
        hooked, _ = generated(model, given)
    for hook in hooks:
        hook.remove()
    assert torch.equal(cached, hooked)
    return DIFFERS


class EditsOnce:
    """A hook that edits the first rows of a block's first output as the oracle does, and leaves the others."""

    def __init__(self, mask: Tensor):
        self.mask, self.done = mask, False

    def __call__(self, block: Any, _args: Any, output: Any) -> Any:
        if self.done:
            return None
        self.done = True
        hidden, m = first_tensor(output), block.reft.reft_edit["first"]
        rows = rows_wanted(block.reft.layout, hidden, self.mask, last=0)
        hidden = reference.edit_rows(hidden, rows, m.R, m.W, m.R, m.b)
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])


def generated(model: Any, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What is written with a cache, and without one."""
    found = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        found.append(model.generate(**given, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=use_cache))
    return found[0], found[1]


def findings(model_type: str) -> dict[str, Any]:
    """The table's entry of a model type; an exception says what is wrong."""
    classes = BY_TYPE[model_type]
    kind, name = next(iter(classes.items()))
    if model_type in NOT_BUILT:
        why, (error, match) = NOT_BUILT[model_type]
        with pytest.raises(error, match=match):
            zoo.build(model_type, kind, name)
        return {"classes": classes, "why_not": why}
    if model_type in UNSUPPORTED:
        with pytest.raises(ValueError, match=f"cannot be edited: {UNSUPPORTED[model_type]}"):
            get_reft_model(zoo.build(model_type, kind, name), ReftConfig())
        return {"classes": classes, "why_not": UNSUPPORTED[model_type]}
    blocks: dict[str, str] = {}
    generates = set()
    for kind in classes:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pattern, source, generate = check_class(model_type, kind, folder)
        blocks.setdefault(pattern, source)
        generates.add(generate)
    found = {"classes": classes, "blocks": sorted(blocks), "source": next(iter(blocks.values()))}
    return found | ({"generate": max(generates)} if max(generates) else {})


def named_types() -> set[str]:
    """The types that must be among those that work."""
    return set(
        "bert gpt2 gpt_neox xlnet llama mistral mixtral qwen2 qwen3 gemma gemma2 gemma3_text gemma3 phi phi3 olmo olmo2 "
        "falcon mpt opt bloom t5 bart mbart m2m_100 roberta deberta deberta-v2 modernbert vit clip_text_model whisper".split()
    )


def page() -> str:
    """docs/models.md with the numbers and the lists of the table."""
    table = json.loads(TABLE.read_text())
    why_not = {t: entry["why_not"] for t, entry in table["models"].items() if "why_not" in entry}
    text = PAGE.read_text()
    for name, lines in (
        ("counts", [f"- {line}" for line in totals(table)]),
        ("does not work", as_rows("Why", why_not)),
        ("generation", as_rows("What generate does", unusual_generation(table))),
    ):
        written = "\n".join([f"<!-- {name} -->", *lines, "<!-- end -->"])
        text, found = re.subn(f"<!-- {name} -->.*?<!-- end -->", lambda _, new=written: new, text, flags=re.S)
        assert found == 1, name
    return text


def as_rows(heading: str, entries: dict[str, str]) -> list[str]:
    return [f"| Model type | {heading} |", "|---|---|", *(f"| {t} | {entry} |" for t, entry in entries.items())]


def unusual_generation(table: dict[str, Any]) -> dict[str, str]:
    return {t: e["generate"] for t, e in table["models"].items() if e.get("generate", "checked") != "checked"}


@pytest.mark.parametrize("model_type", BY_TYPE)
def test_every_model_type(model_type):
    assert findings(model_type) == json.loads(TABLE.read_text())["models"][model_type]


def test_the_table_lists_every_type_and_enough_that_work():
    table = json.loads(TABLE.read_text())
    assert table["transformers"] == transformers.__version__
    assert table["models"].keys() == BY_TYPE.keys()
    works = {model_type for model_type, entry in table["models"].items() if "blocks" in entry}
    assert len(works) >= 120
    assert named_types() <= works
    assert BY_TYPE.keys() - works == NOT_BUILT.keys() | UNSUPPORTED.keys()


def test_which_types_generate_otherwise_than_by_the_rule():
    assert unusual_generation(json.loads(TABLE.read_text())) == NO_GENERATION | dict.fromkeys(CACHE_DIFFERS, DIFFERS)


def test_the_zoo_lists_every_class_of_the_mappings():
    auto = transformers.models.auto.modeling_auto
    heads = ("CAUSAL_LM", "MASKED_LM", "SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION", "SEQ_TO_SEQ_CAUSAL_LM")
    for kind, head in zip(zoo.KINDS, heads, strict=True):
        mapping = getattr(auto, f"MODEL_FOR_{head}_MAPPING_NAMES")
        assert {t: classes[kind] for t, classes in BY_TYPE.items() if kind in classes} == dict(mapping)


@pytest.mark.parametrize("model_type", ["musicgen"])
def test_a_type_whose_generate_is_not_checked_is_as_the_reason_says(model_type):
    model = zoo.build(model_type, "causal", BY_TYPE[model_type]["causal"])
    seen: list[int] = []
    find_blocks(model).modules[0].register_forward_hook(lambda _m, _a, out: seen.append(first_tensor(out).shape[1]))
    generated(model, zoo.prompt(model))
    assert seen[0] == 1 and zoo.LENGTH in seen  # the cached run's first forward, and the one without a cache


def test_the_page_of_models_is_written_from_the_table():
    assert PAGE.read_text() == page()


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    entries = {model_type: findings(model_type) for model_type in sorted(BY_TYPE)}
    TABLE.write_text(json.dumps({"transformers": transformers.__version__, "models": entries}, indent=1) + "\n")
    PAGE.write_text(page())
