"""The cases of PEFT's own tests (its tests/testing_common.py, 0.21), asked of ReFT; docs/peft-matrix.md says which hold."""

import copy
import pickle
import re
from pathlib import Path

import peft
import pytest
import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from tiny import batch, hooks_on, logits, make
from torch import nn

from fastreft import ReftConfig
from fastreft.interventions import INTERVENTIONS

DOCS = Path(__file__).resolve().parents[2] / "docs" / "peft-matrix.md"
CASES = {}


def t5():
    torch.manual_seed(0)
    shape = dict(vocab_size=61, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0)
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(initializer_factor=0.5, decoder_start_token_id=0, pad_token_id=0, **shape)
    ).eval()


class Custom(nn.Module):
    """A model of nobody's, with a convolution and an attention whose outputs are as wide as its hidden state."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.config = transformers.PretrainedConfig(hidden_size=32, model_type="custom")
        self.embed = nn.Embedding(61, 32)
        self.conv = nn.Conv1d(32, 32, 3, padding=1)
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
        self.head = nn.Linear(32, 5)

    def forward(self, input_ids, attention_mask=None, labels=None):
        x = self.embed(input_ids)
        x = x + self.conv(x.mT).mT
        for layer in self.layers:
            x = x + layer(x).tanh()
        out = self.head(x)
        loss = None if labels is None else out.square().mean()
        return transformers.modeling_outputs.TokenClassifierOutput(loss=loss, logits=out)


MODELS = {
    "llama": (lambda: make("llama"), {}),
    "gpt2": (lambda: make("gpt2"), {}),
    "bert": (lambda: make("bert-cls"), {"task_type": "SEQ_CLS"}),
    "t5": (t5, {"task_type": "SEQ_2_SEQ_LM"}),
    "custom": (Custom, {"target_modules": r"layers\.\d+"}),
}
CAUSAL = ("llama", "gpt2")


def case(name, models=tuple(MODELS)):
    """A case of PEFT's, and the models that it is asked of."""

    def keep(function):
        CASES[name] = function, models
        return function

    return keep


def config_of(kind, **settings):
    return ReftConfig(**{"r": 2, "positions": "f2+l2", **MODELS[kind][1], **settings})


def peft_of(kind, adapter="default", **settings):
    base = MODELS[kind][0]()
    torch.manual_seed(2)
    model = get_peft_model(base, config_of(kind, **settings), adapter_name=adapter)
    for name, p in model.named_parameters():
        if name.endswith(".b"):
            p.data.normal_(0, 3)
    return model.eval()


def inputs_of(kind):
    given = batch("right")
    return given | {"decoder_input_ids": torch.full((3, 2), 5)} if kind == "t5" else given


def out(model, kind):
    with torch.no_grad():
        return model(**inputs_of(kind)).logits


def labelled(kind):
    given = batch("right")
    if kind == "bert":
        return given | {"labels": torch.tensor([0, 1, 0])}
    labels = given["input_ids"].clone()
    labels[:, :3] = -100
    return given | {"labels": labels}


@case("active adapter attribute, repr, model card")
def attributes(kind, folder):
    model = peft_of(kind, "mine")
    assert model.active_adapter == "mine" and model.active_adapters == ["mine"] and "reft_edit" in repr(model)
    model.save_pretrained(folder)
    assert (folder / "README.md").is_file() and (folder / "mine" / "adapter_config.json").is_file()


@case("prepare for training: inputs that require gradients", ("llama", "gpt2", "bert"))
def prepare(kind, folder):
    model = peft_of(kind)
    model.enable_input_require_grads()
    seen = []
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_hook(lambda _m, _a, output: seen.append(output.requires_grad))
    model(**inputs_of(kind))
    assert seen and all(seen)


@case("save and load, safetensors")
def save_and_load(kind, folder):
    model = peft_of(kind)
    model.save_pretrained(folder)
    again = PeftModel.from_pretrained(MODELS[kind][0](), folder)
    assert torch.equal(out(again, kind), out(model, kind))
    assert set(load_file(folder / "adapter_model.safetensors")) == set(get_peft_model_state_dict(model))


@case("save and load, pickled")
def save_pickled(kind, folder):
    model = peft_of(kind)
    model.save_pretrained(folder, safe_serialization=False)
    assert (folder / "adapter_model.bin").is_file()
    assert torch.equal(out(PeftModel.from_pretrained(MODELS[kind][0](), folder), kind), out(model, kind))


@case("save selected adapters")
def selected(kind, folder):
    model = peft_of(kind)
    model.add_adapter("other", config_of(kind))
    model.save_pretrained(folder, selected_adapters=["other"])
    assert [p.parent.name for p in folder.rglob("adapter_config.json")] == ["other"]
    with pytest.raises(ValueError, match="selected_adapters"):
        model.save_pretrained(folder, selected_adapters=["nobody"])


@case("load several adapters, switch between them")
def several(kind, folder):
    model = peft_of(kind)
    first = out(model, kind)
    model.add_adapter("other", config_of(kind, positions="l1"))
    model.set_adapter("other")
    second = out(model, kind)
    assert not torch.equal(first, second)
    model.save_pretrained(folder)
    again = PeftModel.from_pretrained(MODELS[kind][0](), folder)
    again.load_adapter(folder / "other", "other")
    assert torch.equal(out(again, kind), first)
    again.set_adapter("other")
    assert torch.equal(out(again, kind), second)


@case("several adapters active at once", ("llama", "gpt2", "t5", "custom"))
def together(kind, folder):
    model = peft_of(kind)
    model.add_adapter("other", config_of(kind, positions="l1"))
    one = out(model, kind)
    model.base_model.set_adapter(["default", "other"])
    assert model.base_model.active_adapters == ["default", "other"] and not torch.equal(out(model, kind), one)


@case("a configuration passed to from_pretrained")
def given_config(kind, folder):
    model = peft_of(kind)
    model.save_pretrained(folder)
    config = PeftConfig.from_pretrained(folder)
    again = PeftModel.from_pretrained(MODELS[kind][0](), folder, config=config)
    assert torch.equal(out(again, kind), out(model, kind))


@case("inference mode, is_trainable")
def trainable(kind, folder):
    peft_of(kind).save_pretrained(folder)
    frozen = PeftModel.from_pretrained(MODELS[kind][0](), folder)
    assert not any(p.requires_grad for name, p in frozen.named_parameters() if "reft_" in name)
    free = PeftModel.from_pretrained(MODELS[kind][0](), folder, is_trainable=True)
    assert all(p.requires_grad for name, p in free.named_parameters() if "reft_" in name)


@case("low_cpu_mem_usage, tensors on meta")
def low_memory(kind, folder):
    model = peft_of(kind)
    model.save_pretrained(folder)
    again = PeftModel.from_pretrained(MODELS[kind][0](), folder, low_cpu_mem_usage=True)
    assert not any(p.is_meta for p in again.parameters()) and torch.equal(out(again, kind), out(model, kind))


@case("training updates the adapter and nothing else")
def training(kind, folder):
    model = peft_of(kind).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**labelled(kind)).loss.backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    free = {name for name, p in model.named_parameters() if p.requires_grad}
    assert moved <= free and any("reft_" in name for name in moved)
    assert all("reft_" in name or "classifier" in name for name in free)


@case("training with layers_to_transform", ("llama", "gpt2", "bert"))
def some_layers(kind, folder):
    model = peft_of(kind, layers_to_transform=[1]).train()
    model(**labelled(kind)).loss.backward()
    touched = [name for name, p in model.named_parameters() if p.grad is not None and "reft_" in name]
    assert touched and all(".1.reft." in name for name in touched)


@case("training with gradient checkpointing", ("llama", "gpt2", "bert", "t5"))
def checkpointing(kind, folder):
    found = []
    for recomputed in (False, True):
        model = peft_of(kind).train()
        if recomputed:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**labelled(kind)).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None and "reft_" in name})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


@case("disable_adapter, also as a context")
def disable(kind, folder):
    model, plain = peft_of(kind), out(MODELS[kind][0](), kind)
    edited = out(model, kind)
    with model.disable_adapter():
        assert torch.equal(out(model, kind), plain)
    assert torch.equal(out(model, kind), edited) and not torch.equal(edited, plain)
    model.base_model.disable_adapter_layers()
    assert torch.equal(out(model, kind), plain)
    model.base_model.enable_adapter_layers()
    assert torch.equal(out(model, kind), edited)


@case("delete an active, an inactive, an unknown adapter")
def delete(kind, folder):
    model = peft_of(kind)
    first = out(model, kind)
    model.add_adapter("other", config_of(kind))
    with pytest.raises(ValueError, match="nobody"):
        model.delete_adapter("nobody")
    model.delete_adapter("other")
    assert list(model.peft_config) == ["default"] and torch.equal(out(model, kind), first)
    model.add_adapter("other", config_of(kind, positions="l1"))
    model.delete_adapter("default")
    assert model.base_model.active_adapters == ["other"] and not torch.equal(out(model, kind), first)


@case("unload")
def unload(kind, folder):
    base = peft_of(kind).unload()
    assert hooks_on(base) == hooks_on(MODELS[kind][0]()) and torch.equal(out(base, kind), out(MODELS[kind][0](), kind))


@case("requires_grad follows the active adapter; set_requires_grad")
def requires_grad(kind, folder):
    model = peft_of(kind)
    model.add_adapter("other", config_of(kind))

    def free():
        return {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad and ".reft." in name}

    assert free() == {"default"}
    model.set_adapter("other")
    assert free() == {"other"}
    model.set_requires_grad("default")
    assert free() == {"default", "other"}
    model.set_requires_grad(["default", "other"], requires_grad=False)
    assert free() == set()


@case("merge_and_unload, merge_adapter, unmerge_adapter: refused")
def merge(kind, folder):
    model = peft_of(kind)
    for call in (model.merge_and_unload, model.merge_adapter, model.unmerge_adapter):
        with pytest.raises(ValueError, match="has no weight form, so it cannot be merged"):
            call()


@case("mixed batches by adapter_names")
def mixed(kind, folder):
    model = peft_of(kind).eval()
    names = ["default", "__base__", "default"]
    with torch.no_grad():
        found, edited = (model(**inputs_of(kind), **more)[0] for more in ({"adapter_names": names}, {}))
        with model.disable_adapter():
            untouched = model(**inputs_of(kind))[0]
    for i, name in enumerate(names):
        torch.testing.assert_close(found[i], untouched[i] if name == "__base__" else edited[i])
    assert not torch.equal(edited, untouched)


@case("weighted combination of adapters: not there")
def weighted(kind, folder):
    assert not hasattr(peft_of(kind).base_model, "add_weighted_adapter")


@case("generate, by keyword and by position", CAUSAL)
def generate(kind, folder):
    model, given = peft_of(kind), batch("left")
    wanted = model.generate(**given, max_new_tokens=3, do_sample=False)
    assert torch.equal(model.generate(inputs=given["input_ids"], attention_mask=given["attention_mask"],
                                      max_new_tokens=3, do_sample=False), wanted)  # fmt: skip
    base = model.base_model.generate(
        given["input_ids"], attention_mask=given["attention_mask"], max_new_tokens=3, do_sample=False
    )
    assert torch.equal(base, wanted)


@case("generate in half precision", CAUSAL)
def half(kind, folder):
    model = peft_of(kind).to(torch.bfloat16)
    assert model.generate(**batch("left"), max_new_tokens=2).shape == (3, 11)


@case("inputs_embeds", CAUSAL)
def embeddings(kind, folder):
    model, given = peft_of(kind), batch("right")
    embeds = model.get_input_embeddings()(given["input_ids"])
    with torch.no_grad():
        found = model(inputs_embeds=embeds, attention_mask=given["attention_mask"]).logits
    torch.testing.assert_close(found, logits(model, given))


@case("feature extraction, a model without its head", CAUSAL)
def features(kind, folder):
    inner = MODELS[kind][0]().get_decoder() if kind == "llama" else MODELS[kind][0]().transformer
    model = get_peft_model(inner, ReftConfig(r=2, task_type="FEATURE_EXTRACTION"))
    assert model(**batch("right")).last_hidden_state.shape == (3, 9, 32)


@case("modules_to_save", ("bert",))
def whole_modules(kind, folder):
    model = peft_of(kind)
    head = model.get_base_model().classifier.modules_to_save["default"].weight
    head.data.add_(1)
    model.save_pretrained(folder)
    again = PeftModel.from_pretrained(MODELS[kind][0](), folder)
    assert torch.equal(out(again, kind), out(model, kind))


@case("resized embeddings are saved with it", CAUSAL)
def resized(kind, folder):
    model = peft_of(kind)
    model.get_base_model().resize_token_embeddings(70, mean_resizing=False)
    model.save_pretrained(folder, save_embedding_layers=True)
    base = MODELS[kind][0]()
    base.resize_token_embeddings(70, mean_resizing=False)
    assert torch.equal(logits(PeftModel.from_pretrained(base, folder), batch()), logits(model, batch()))


@case("copy, pickle, state_dict")
def copies(kind, folder):
    model = peft_of(kind)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)) if kind != "custom" else copy.copy(model)):
        assert torch.equal(out(twin, kind), out(model, kind))
    torch.save(model.state_dict(), folder / "state.pt")
    other = peft_of(kind)
    other.load_state_dict(torch.load(folder / "state.pt", weights_only=True))
    assert torch.equal(out(other, kind), out(model, kind))


@case("inject_adapter_in_model and a state dict, without a PeftModel")
def low_level(kind, folder):
    wanted = peft_of(kind)
    state = get_peft_model_state_dict(wanted)
    base = MODELS[kind][0]()
    settings = {"modules_to_save": ["classifier"]} if kind == "bert" else {}
    base = peft.inject_adapter_in_model(config_of(kind, **settings), base)
    state = {key.removeprefix("base_model.model."): value for key, value in state.items()}
    set_peft_model_state_dict(base, state)
    assert torch.equal(out(base.eval(), kind), out(wanted, kind))


@case("a configuration as JSON, with unknown and with missing keys")
def configuration(kind, folder):
    config = config_of(kind)
    config.save_pretrained(folder)
    path = folder / "adapter_config.json"
    text = path.read_text()
    assert ReftConfig.from_pretrained(folder).to_dict() == config.to_dict()
    path.write_text(text.replace("{", '{"of_a_later_version": 1,', 1))
    with pytest.warns(UserWarning, match="of_a_later_version"):
        assert PeftConfig.from_pretrained(folder).r == 2


@case("the other interventions save, load and train", ("llama",))
def interventions(kind, folder):
    for name in INTERVENTIONS:
        model = peft_of(kind, intervention_type=name)
        model.save_pretrained(folder / name)
        again = PeftModel.from_pretrained(MODELS[kind][0](), folder / name, is_trainable=True)
        assert torch.equal(out(again, kind), out(model, kind))
        again.train()(**labelled(kind)).loss.backward()
        assert all(p.grad is not None for p in again.parameters() if p.requires_grad)


PAIRS = [(name, kind) for name, (_, models) in CASES.items() for kind in models]


@pytest.mark.filterwarnings("ignore:this forward:UserWarning")
@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_it_is_as_peft_has_it(name, kind, tmp_path):
    CASES[name][0](kind, tmp_path)


def test_the_table_lists_these_cases_and_counts_them():
    text = DOCS.read_text(encoding="utf-8")
    listed = {row[1].strip(): row[2].strip() for row in re.finditer(r"^\| ([^|]+) \| ([^|]+) \|", text, re.M)}
    for name, (_, models) in CASES.items():
        assert listed.get(name) == (", ".join(models) if len(models) < len(MODELS) else "all five"), name
    assert f"{len(CASES)} cases, {len(PAIRS)} tests" in text
