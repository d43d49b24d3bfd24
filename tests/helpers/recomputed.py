"""The slow reference of generation: the base model run on the whole sequence for every token, edited by plain hooks.

Which rows are edited is worked out here from the prompts' lengths alone. All in fp64, so that no two tokens tie.
"""

import copy
from contextlib import contextmanager

import torch
import transformers
from tiny import VOCAB, make
from torch.nn import functional as F

import fastreft
from fastreft import reference

NEW = 5
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
_SHAPE = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
_DECODER = dict(vocab_size=VOCAB, num_hidden_layers=3, initializer_range=0.2, pad_token_id=0, **_SHAPE)
_SEQ2SEQ = dict(vocab_size=VOCAB, d_model=32, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)
_FFN = dict(encoder_ffn_dim=48, decoder_ffn_dim=48, encoder_attention_heads=4, decoder_attention_heads=4)
# Family -> its model, and where the blocks that are edited lie.
_CONFIGS = {
    "mistral": transformers.MistralConfig(sliding_window=4, **_DECODER),
    "gemma3": transformers.Gemma3TextConfig(
        sliding_window=4, layer_types=["sliding_attention", "full_attention", "sliding_attention"], **_DECODER
    ),
    "t5": transformers.T5Config(d_kv=8, d_ff=48, num_layers=2, num_heads=4, initializer_factor=0.5, **_SEQ2SEQ),
    "bart": transformers.BartConfig(encoder_layers=2, decoder_layers=2, init_std=0.2, **_FFN, **_SEQ2SEQ),
}
_BLOCKS = {
    "gpt2": "transformer.h",
    "t5": "encoder.block",
    "bart": "model.encoder.layers",
    "t5 decoder": "decoder.block",
    "bart decoder": "model.decoder.layers",
}
SEQ2SEQ = ("t5", "bart")
DECODERS = ("t5 decoder", "bart decoder")


def plain_of(family):
    """A tiny model with fixed random weights."""
    if family in ("llama", "gpt2"):
        return make(family).double()
    torch.manual_seed(0)
    auto = transformers.AutoModelForSeq2SeqLM if family in SEQ2SEQ + DECODERS else transformers.AutoModelForCausalLM
    model = auto.from_config(copy.deepcopy(_CONFIGS[family.split()[0]])).double().eval()
    model.generation_config.forced_eos_token_id = None
    return model


def blocks_of(model, family):
    """The blocks that are edited, of a plain model."""
    return model.get_submodule(_BLOCKS.get(family, "model.layers"))


class Case:
    """The model with an adapter, and a plain one that repeats what it should do."""

    def __init__(self, family, positions="f2+l3", **config):
        self.family, self.positions = family, positions
        self.two_stacks = family in SEQ2SEQ + DECODERS
        task = "SEQ_2_SEQ_LM" if self.two_stacks else "CAUSAL_LM"
        if family in DECODERS:
            config["target_modules"] = rf"{_BLOCKS[family]}\.\d+"
        config = fastreft.ReftConfig(task_type=task, positions=positions, **config)
        self.plain = plain_of(family)
        self.model = fastreft.get_reft_model(plain_of(family), config).double().eval()
        self.edits = [block.reft.reft_edit["default"] for block in blocks_of(self.model.get_base_model(), family)]
        with torch.no_grad():  # a large edit, so that one too many or too few would show
            for m in self.edits:
                m.b.normal_().mul_(3)

    @contextmanager
    def edited(self, chosen, written=None):
        """Within it the plain model edits the ``chosen`` columns of each sample, beams alike, as far as there are some.

        All columns from ``written`` on, too, where that is given.
        """

        def hook_of(m):
            def hook(_block, _args, output):
                h = output if isinstance(output, torch.Tensor) else output[0]
                rows = []
                for i in range(h.shape[0]):
                    columns = [s for s in chosen[i * len(chosen) // h.shape[0]] if s < h.shape[1]]
                    columns += [] if written is None else range(written, h.shape[1])
                    rows += [i * h.shape[1] + s for s in columns]
                h = reference.edit_rows(h, torch.tensor(rows, dtype=torch.long), m.R, m.W, m.R, m.b)
                return h if isinstance(output, torch.Tensor) else (h, *output[1:])

            return hook

        pairs = zip(blocks_of(self.plain, self.family), self.edits, strict=True)
        handles = [block.register_forward_hook(hook_of(m)) for block, m in pairs]
        try:
            with torch.no_grad():
                yield self.plain
        finally:
            for handle in handles:
                handle.remove()

    def chosen(self, lengths, side, width):
        """The columns that the positions mean, from the lengths of the prompts, which are ``width`` wide; written ones, too."""
        if self.positions[0] == "d":
            return [[*range(width, width + int(self.positions[1:]))] for _ in lengths]
        if ":" in self.positions:
            starts = [width - n if side == "left" else 0 for n in lengths]
            shown = [[*range(a, a + n), *range(width, width + NEW)] for a, n in zip(starts, lengths, strict=True)]
            begin, end = (int(part) if part else None for part in self.positions.split(":"))
            return [columns[begin:end] for columns in shown]
        first, last = {"f2+l3": (2, 3), "l1": (0, 1), "prompt": (width, width)}[self.positions]
        found = []
        for n in lengths:
            start = width - n if side == "left" else 0
            f = min(first, n // 2)
            found.append([start + k for k in [*range(f), *range(n - min(last, n - f if first else n), n)]])
        return found

    def greedy(self, inputs, chosen, written=None):
        """Greedy decoding, all of it again for each token: the tokens and each step's logits."""
        if self.two_stacks:
            given = dict(inputs)
            ids = inputs.get("decoder_input_ids", torch.zeros(len(inputs["input_ids"]), 1, dtype=torch.long))
        else:
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
        steps = []
        for _ in range(NEW):
            if self.two_stacks:
                given["decoder_input_ids"] = ids
                if "decoder_attention_mask" in inputs:
                    new = ids.shape[1] - inputs["decoder_attention_mask"].shape[1]
                    given["decoder_attention_mask"] = F.pad(inputs["decoder_attention_mask"], (0, new), value=1)
            else:
                given = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            with self.edited(chosen, written) as plain:
                steps.append(plain(**given, use_cache=False).logits[:, -1])
            ids = torch.cat([ids, steps[-1].argmax(-1, keepdim=True)], 1)
        return ids, torch.stack(steps)

    def generated(self, chosen, *args, **kwargs):
        """What the plain model's own generate makes of it without a cache."""
        with self.edited(chosen) as plain:
            return plain.generate(*args, **kwargs, use_cache=False)


def prompts(side="none"):
    """Inputs and the lengths of the prompts: three of one length, or padded to it on a side."""
    lengths = [9, 9, 9] if side == "none" else [7, 4, 9]
    torch.manual_seed(1)
    column = torch.arange(9)
    mask = torch.stack([column >= 9 - n if side == "left" else column < n for n in lengths]).long()
    return {"input_ids": torch.randint(2, VOCAB, (3, 9)) * mask, "attention_mask": mask}, lengths


def check(found, wanted):
    """Tokens equal and logits near, of a generate that was asked for both; ``wanted`` as ``Case.greedy`` gives it."""
    ids, logits = wanted
    assert torch.equal(found.sequences, ids)
    logits = logits.float()  # as generate keeps them
    torch.testing.assert_close(torch.stack(found.logits), logits, rtol=1e-5, atol=1e-5)


SHOWN = GREEDY | {"return_dict_in_generate": True, "output_logits": True}
