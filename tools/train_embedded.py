"""Train fastreft's embedded default model: a tiny Llama on public-domain English, on one CPU core.

    python tools/train_embedded.py --corpus childrens.tar.xz --out DIR [--minutes 50] [--seed 0]

DIR gets the model (bf16 safetensors), its tokenizer and training.json with the numbers of the model card.
"""

from __future__ import annotations

import argparse
import html
import json
import math
import re
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as FastTokenizer

HELD_OUT = ("Edith_Nesbit_The_Railway_Children", "Jack_London_The_Call_of_the_Wild")
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
CONTEXT = 512
VOCAB, HIDDEN, INTERMEDIATE, LAYERS = 2048, 192, 384, 5
BATCH, PEAK_LR = 8, 2e-3  # rows of 256 tokens a step
PROMPTS = ("Once upon a time", "The old king", "Alice was")
# GPT-2's split, but runs of newlines are one piece (a paragraph break is one token) and digits stand alone.
SPLIT = r"'(?:[sdmt]|ll|ve|re)\b| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\n+| +(?!\S)|\s"
PLAIN = str.maketrans(
    {
        "\u2018": "'",
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2014": "--",
        "\u2013": "-",
        "\u2026": "...",
        "\u00a0": " ",
        "\t": " ",
        "\r": "",
        "_": "",
        "*": "",
        "\\": "",
    }
)


def chapters(markdown: str) -> list[list[str]]:
    """The paragraphs of each chapter: plain quotes, no markdown, no head matter, wrapped lines joined."""
    text = markdown.partition("\n-------")[2] or markdown  # the title block ends in a rule
    # A few files hold UTF-8 that was once read as Latin-1.
    text = re.sub("\u00c3[\u0080-\u00bf]", lambda m: m[0].encode("latin-1").decode("utf-8"), text)
    text = html.unescape(text).translate(PLAIN)
    found = []
    for chapter in re.split(r"(?m)^#.*$", text):
        paragraphs = []
        for block in re.split(r"\n\s*\n", chapter):
            lines = [re.sub(r"\s+", " ", line.lstrip("> ")).strip() for line in block.split("\n")]
            lines = [line for line in lines if re.search(r"\w", line)]  # rules and ornaments go
            # Verse starts every line with a capital and keeps its lines; anything else was wrapped.
            verse = all(re.match(r"[^a-zA-Z]*[A-Z]", line) for line in lines)
            if lines:
                paragraphs.append(("\n" if verse else " ").join(lines))
        if paragraphs:
            found.append(paragraphs)
    return found


def read_corpus(path: Path) -> dict[str, list[list[str]]]:
    with tarfile.open(path) as tar:
        members = sorted((m for m in tar if m.name.endswith(".md")), key=lambda m: m.name)
        return {Path(m.name).stem: chapters(tar.extractfile(m).read().decode("utf-8")) for m in members}


def train_tokenizer(texts: Iterator[str]) -> FastTokenizer:
    tok = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tok.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[BOS, EOS, PAD], initial_alphabet=alphabet, show_progress=False
    )
    tok.train_from_iterator(texts, trainer)
    tok.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, tok.token_to_id(BOS))]
    )
    return FastTokenizer(
        tokenizer_object=tok,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: FastTokenizer, out: Path) -> None:
    tokenizer.save_pretrained(out)
    # The class name that Transformers 4 and 5 both know; "llama" in config.json would otherwise choose one.
    path = out / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2) + "\n")


def stream(tokenizer: FastTokenizer, books: list[list[list[str]]]) -> tuple[np.ndarray, np.ndarray, int]:
    """All tokens end to end with </s><s> between chapters, where paragraphs start, and the bytes of text."""
    ids: list[int] = []
    starts: list[int] = []
    size = 0
    for paragraphs in (chapter for book in books for chapter in book):
        pieces = [p + "\n\n" for p in paragraphs[:-1]] + paragraphs[-1:]
        # Newlines are a piece of their own, so paragraphs can be encoded one by one.
        for piece in tokenizer(pieces, add_special_tokens=False, verbose=False)["input_ids"]:
            starts.append(len(ids))
            ids += piece
        ids += [tokenizer.eos_token_id, tokenizer.bos_token_id]
        size += sum(len(p.encode("utf-8")) for p in pieces)
    return np.array(ids), np.array(starts), size


def cut_rows(ids: np.ndarray, starts: np.ndarray, length: int, bos: int, rng: np.random.Generator) -> list:
    """One pass over the stream in rows of `length`: <s> and a paragraph's start wherever one is near.

    The next row starts at a random paragraph start in this row's second half, so passes differ."""
    rows, pos = [], int(starts[rng.integers(16)])
    while pos + length <= len(ids):
        fresh = starts[np.searchsorted(starts, pos) % len(starts)] == pos
        rows.append(np.concatenate(([bos], ids[pos : pos + length - 1])) if fresh else ids[pos : pos + length])
        low, high = np.searchsorted(starts, [pos + length // 2, pos + length - 1])
        pos = int(starts[rng.integers(low, high)]) if high > low else pos + length - fresh
    return rows


def batches(ids: np.ndarray, starts: np.ndarray, length: int, size: int, bos: int, seed: int) -> Iterator:
    """Endless batches (size, length) of shuffled rows."""
    rng = np.random.default_rng([seed, length])
    while True:
        rows = cut_rows(ids, starts, length, bos, rng)
        rng.shuffle(rows)
        for i in range(0, len(rows) - size + 1, size):
            yield torch.from_numpy(np.stack(rows[i : i + size]))


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, ids: np.ndarray, bos: int, limit: int | None = None) -> float:
    """Summed negative log-likelihood (nats) of every token once: <s> and 255 tokens a window, no overlap."""
    total = 0.0
    for window in torch.from_numpy(ids).split(255)[:limit]:
        rows = torch.nn.functional.pad(window[None], (1, 0), value=bos)
        logits = model(input_ids=rows).logits[:, :-1].float()
        targets = rows[:, 1:].flatten()
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="sum").item()
    return total


def sample(model: LlamaForCausalLM, tokenizer: FastTokenizer, prompt: str, seed: int) -> str:
    torch.manual_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    out = model.generate(**inputs, do_sample=True, temperature=0.7, top_p=0.9, max_new_tokens=100)
    return tokenizer.decode(out[0], skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--corpus", type=Path, required=True, help="tar of markdown books")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=50.0, help="of training, which paces the schedule")
    parser.add_argument("--steps", type=int, help="instead of minutes, repeatable on one machine")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-compile", action="store_true", help="slower, but needs no C++ compiler")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)

    books = read_corpus(args.corpus)
    train = [book for name, book in books.items() if name not in HELD_OUT]
    tokenizer = train_tokenizer("\n\n".join(chapter) for book in train for chapter in book)
    save_tokenizer(tokenizer, args.out)
    bos = tokenizer.bos_token_id
    ids, starts, size = stream(tokenizer, train)
    held_out = {name: stream(tokenizer, [books[name]]) for name in HELD_OUT}
    per_byte = sum(len(v[0]) for v in held_out.values()) / sum(v[2] for v in held_out.values()) / math.log(2)
    print(f"{len(train)} books, {size} bytes, {len(ids)} tokens, {len(starts)} paragraphs", flush=True)

    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HIDDEN // 32,
        num_key_value_heads=HIDDEN // 32,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        dtype="bfloat16",
        **special,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(**special)
    model.set_attn_implementation("eager")  # SDPA's backward is slow on a CPU at head_dim 32
    # fp32 masters and bf16 weights are faster than autocast. Buffers stay fp32: RoPE's angles need it.
    weights = list(model.parameters())
    masters = [p.detach().clone().requires_grad_() for p in weights]
    for p in weights:
        p.data = p.data.bfloat16()
    count = sum(p.numel() for p in weights)
    decay, rest = [p for p in masters if p.dim() > 1], [p for p in masters if p.dim() == 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.98), fused=True)
    forward = model if args.no_compile else torch.compile(model, dynamic=False)
    short = batches(ids, starts, 256, BATCH, bos, args.seed)
    long = batches(ids, starts, CONTEXT, BATCH // 2, bos, args.seed)

    began = logged = saved = time.time()
    step = tokens = 0
    smooth, progress = math.log(VOCAB), 0.0
    while progress < 1.0:
        # The learning rate: 3 % warm-up, then a cosine to a fiftieth.
        lr = PEAK_LR * min(progress / 0.03 + 0.01, 1.0, 0.51 + 0.49 * math.cos(math.pi * progress))
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = lr
        rows = next(long if step % 8 == 7 else short)  # one step in eight teaches the context's second half
        loss = forward(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        for master, p in zip(masters, weights, strict=True):
            master.grad, p.grad = p.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        with torch.no_grad():
            for master, p in zip(masters, weights, strict=True):
                p.copy_(master)
        smooth += 0.02 * (loss.item() - smooth)
        step, tokens, now = step + 1, tokens + rows.numel(), time.time()
        progress = step / args.steps if args.steps else (now - began) / (60 * args.minutes)
        if now - logged > 60:
            nll = sum(evaluate(model, v[0], bos, 64) for v in held_out.values()) / (2 * 64 * 255)
            rate = tokens / (now - began)
            print(
                f"{(now - began) / 60:5.1f} min  step {step}  lr {lr:.1e}  {rate:.0f} tokens/s"
                f"  train {smooth:.3f}  val {nll:.3f}  bits/byte ~{nll * per_byte:.3f}",
                flush=True,
            )
            logged = now
        if now - saved > 240:
            model.save_pretrained(args.out)
            saved = now

    minutes = (time.time() - began) / 60
    model.save_pretrained(args.out)
    model = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32)  # judge what a user loads
    result = {
        "parameters": count,
        "minutes": round(minutes, 1),
        "steps": step,
        "tokens_seen": tokens,
        "train_books": len(train),
        "train_bytes": size,
        "train_tokens": len(ids),
        "final_train_loss": round(smooth, 4),
        "validation": {},
    }
    for name, (v, _, nbytes) in held_out.items():
        nll = evaluate(model, v, bos)
        result["validation"][name] = {
            "tokens": len(v),
            "bytes": nbytes,
            "loss_per_token": round(nll / len(v), 4),
            "bits_per_byte": round(nll / math.log(2) / nbytes, 4),
        }
    result["samples"] = [sample(model, tokenizer, prompt, args.seed) for prompt in PROMPTS]
    (args.out / "training.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
