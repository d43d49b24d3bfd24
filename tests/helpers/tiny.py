"""Tiny random models, and edits by plain hooks: what the tuner is checked against."""

from contextlib import contextmanager

import pytest
import torch
import transformers
from common import SHARED
from transformers.utils import logging

from fastreft import reference

VOCAB, WIDTH, LAYERS = 61, 32, 3

torch.set_num_threads(1)
logging.set_verbosity_error()


def make(kind: str, **config) -> transformers.PreTrainedModel:
    """A model with fixed random weights, in eval mode: llama, qwen3, gpt2, bert (token labels), bert-cls or stories."""
    torch.manual_seed(0)
    if kind == "stories":
        path = SHARED / "models" / "stories260K" / "hf"
        if not path.exists():
            pytest.skip("the stories260K model is not beside this checkout")
        return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    if kind in ("llama", "qwen3"):
        shape = dict(hidden_size=WIDTH, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
        shape["num_hidden_layers"] = LAYERS
        of = transformers.LlamaConfig if kind == "llama" else transformers.Qwen3Config
        config = of(vocab_size=VOCAB, initializer_range=0.2, **(shape | config))
        config.pad_token_id = 0
        return transformers.AutoModelForCausalLM.from_config(config).eval()
    if kind == "gpt2":
        shape = dict(n_embd=WIDTH, n_head=4, n_layer=LAYERS, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
        config = transformers.GPT2Config(vocab_size=VOCAB, initializer_range=0.2, **(shape | config))
        config.eos_token_id = config.bos_token_id = config.pad_token_id = 0
        return transformers.GPT2LMHeadModel(config).eval()
    shape = dict(hidden_size=WIDTH, intermediate_size=48, num_attention_heads=4, num_hidden_layers=LAYERS)
    plain = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    config = transformers.BertConfig(vocab_size=VOCAB, initializer_range=0.2, **(shape | plain | config))
    if kind == "bert":
        return transformers.BertForTokenClassification(config).eval()
    return transformers.BertForSequenceClassification(config).eval()


def save_bert(folder, words: list[str]) -> str:
    """A folder with a tiny BERT, without a head, and a tokenizer that knows these words."""
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    transformers.set_seed(0)
    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    plain = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.2)
    config = transformers.BertConfig(vocab_size=len(words) + 5, **shape, **plain)
    transformers.BertModel(config).save_pretrained(folder)
    return str(folder)


def blocks(model) -> torch.nn.ModuleList:
    """The blocks of a model of :func:`make`, or of a PEFT model round one."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    if hasattr(model, "bert"):
        return model.bert.encoder.layer
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def batch(side: str = "left", lengths=(7, 4, 9), length: int = 9) -> dict[str, torch.Tensor]:
    """Padded token ids and their mask."""
    torch.manual_seed(1)
    ids = torch.randint(1, VOCAB, (len(lengths), length))
    column = torch.arange(length)
    shown = [column >= length - n if side == "left" else column < n for n in lengths]
    mask = torch.stack(shown).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def columns(mask, first: int, last: int, labels=None) -> list[list[int]]:
    """The columns that f{first}+l{last} means, sample by sample, by the paper's rule."""
    out = []
    for b, row in enumerate(mask.tolist()):
        end = len(row)
        if labels is not None:
            end = next((s for s in range(len(row)) if labels[b][s] != -100), len(row))
        prompt = [s for s in range(end) if row[s]]
        f, m = min(first, len(prompt) // 2), min(last, -(-len(prompt) // 2))
        out.append(prompt[:f] + prompt[len(prompt) - m :])
    return out


def adapter_weights(model, adapter: str = "default") -> dict[int, tuple]:
    """Layer -> (R, W, b) of a LoReFT adapter, as copies that take gradients."""
    found = {}
    for i, block in enumerate(blocks(model)):
        if hasattr(block, "reft"):
            m = block.reft.reft_edit[adapter]
            found[i] = tuple(p.detach().clone().requires_grad_() for p in (m.R, m.W, m.b))
    return found


@contextmanager
def hooked(model, weights, chosen: list[list[int]]):
    """Within it the plain model's blocks are edited by the reference at ``chosen`` columns of each sample."""

    def hook_of(R, W, b):
        def hook(_block, _args, output):
            h = output if isinstance(output, torch.Tensor) else output[0]
            rows = torch.tensor([s + i * h.shape[1] for i, columns in enumerate(chosen) for s in columns])
            h = reference.edit_rows(h, rows.long(), R, W, R, b)
            return h if isinstance(output, torch.Tensor) else (h, *output[1:])

        return hook

    handles = [blocks(model)[i].register_forward_hook(hook_of(*w)) for i, w in weights.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def recorded(model):
    """Within it every block's output, as the next block sees it, is copied into the list given."""
    seen: list[torch.Tensor] = []

    def hook(_block, _args, output):
        seen.append((output if isinstance(output, torch.Tensor) else output[0]).detach().clone())

    handles = [block.register_forward_hook(hook) for block in blocks(model)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def hooks_on(model) -> int:
    """How many hooks its modules have. Their number, as ours count as none where a forward has nothing to edit."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def logits(model, inputs) -> torch.Tensor:
    """The model's logits, without gradients."""
    with torch.no_grad():
        return model(**inputs).logits
