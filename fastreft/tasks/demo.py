"""``fastreft demo``: what ReFT does, measured on this machine in under two minutes.

A passage memorised by one rank-1 edit; a behaviour learned by LoReFT beside PEFT's LoRA, on the same batches and judged
on held-out sentences; the adapter saved, loaded and compared. Everything printed is computed here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy  # PEFT writes the base's name into a configuration
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from transformers import set_seed
from transformers.utils import logging

import fastreft

from . import behaviour
from .behaviour import Example, Metrics
from .flags.demo import DemoArguments
from .memorise import PROMPT, Recital, memorise
from .models import load_adapter, load_base, load_tokenizer, save_adapter
from .places import EMBEDDED

BATCH, HELD_OUT, SHOWN = 16, 64, 3
UNTOUCHED, SAVED = "untouched", "LoReFT all"  # the last one is trained last, saved and loaded
# Name -> (configuration, learning rate): the best of a few rates on the embedded model, at another seed than this.
METHODS: dict[str, tuple[PeftConfig, float]] = {
    "LoRA": (LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear"), 5e-3),
    "LoReFT f5+l5": (fastreft.ReftConfig(task_type="CAUSAL_LM", r=8, positions="f5+l5"), 2e-2),
    SAVED: (fastreft.ReftConfig(task_type="CAUSAL_LM", r=4, positions="all"), 2e-2),
}


@dataclass
class Method:
    """One row of the table."""

    parameters: int
    milliseconds: float | None
    metrics: Metrics
    samples: list[str]


@dataclass
class _Work:
    """What both methods share."""

    seed: int
    tokenizer: Any
    batches: list[dict[str, torch.Tensor]]
    held_out: list[Example]
    advance: Callable[[], None]


@dataclass
class Results:
    """All that the demo measured."""

    recitals: list[Recital]
    methods: dict[str, Method]  # by name, the untouched model first
    held_out: list[Example]
    same_after_reload: bool
    seconds: float


def _learn(base: Any, name: str, work: _Work) -> tuple[Any, Method]:
    """(the base with a trained adapter, its row of the table), from the same seed and batches for every method."""
    set_seed(work.seed)
    config, rate = METHODS[name]
    model = get_peft_model(base, copy(config))
    if isinstance(config, fastreft.ReftConfig):
        optimizer: torch.optim.Optimizer = fastreft.ReftAdamW(fastreft.param_groups(model, lr=rate))
    else:
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=rate, weight_decay=0.0)
    milliseconds = behaviour.train(model, optimizer, work.batches, work.advance)
    metrics, samples = behaviour.evaluate(model, work.tokenizer, work.held_out)
    return model, Method(model.get_nb_trainable_parameters()[0], milliseconds, metrics, samples)


def demo(arguments: DemoArguments, console: Console) -> Results:
    """Run the whole demo and return what it measured; prints progress only."""
    began = perf_counter()
    tokenizer = load_tokenizer(arguments.model)
    base = load_base(arguments.model).to("cuda" if torch.cuda.is_available() else "cpu").eval()
    train, held_out = behaviour.examples(arguments.seed, HELD_OUT)
    with _progress(console) as progress:
        task = progress.add_task("memorising", total=2 * arguments.memory_steps + len(METHODS) * arguments.steps)
        work = _Work(
            seed=arguments.seed,
            tokenizer=tokenizer,
            batches=[behaviour.collate(tokenizer, batch, base.device) for batch in _batches(train, arguments.steps)],
            held_out=held_out,
            advance=lambda: progress.advance(task),
        )
        recitals = []
        for layers in [0], list(range(base.config.get_text_config().num_hidden_layers)):
            set_seed(arguments.seed)
            recitals.append(memorise(base, tokenizer, layers, arguments.memory_steps, work.advance))
        rows = {UNTOUCHED: Method(0, None, *behaviour.evaluate(base, tokenizer, held_out))}
        for name in METHODS:
            progress.update(task, description=name)
            model, rows[name] = _learn(base, name, work)
            if name != SAVED:
                base = model.unload()
        progress.update(task, description="reloading")
        with tempfile.TemporaryDirectory() as scratch:
            folder = arguments.output_dir or scratch
            save_adapter(model, tokenizer, arguments.model, folder)
            model = load_adapter(model.unload(), folder)
            again = behaviour.evaluate(model, tokenizer, held_out)[1]
    return Results(recitals, rows, held_out, again == rows[SAVED].samples, perf_counter() - began)


@contextmanager
def _threads_for(model: str) -> Iterator[None]:
    """One thread for the embedded model: more gain it nothing, lose much where cores are shared, and change the sums."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if model == EMBEDDED else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<14}"), BarColumn(), TextColumn("{task.completed}/{task.total} steps"),
        TimeElapsedColumn(), console=console, transient=True,
    )  # fmt: skip


def _batches(train: Sequence[Example], steps: int) -> list[list[Example]]:
    """``steps`` batches, going round the training sentences as often as needed."""
    return [[train[(step * BATCH + i) % len(train)] for i in range(BATCH)] for step in range(steps)]


def report(results: Results, arguments: DemoArguments, console: Console) -> None:
    """Print the results as tables and samples."""
    console.rule("1. A passage in rank-1 edits of one token")
    untouched = results.recitals[0].untouched
    console.print(
        f"ConsReFT on the last token of '{PROMPT}' alone, {arguments.memory_steps} steps. How much of the passage "
        f"comes back exactly, decoded greedily (untouched model: {untouched} tokens):"
    )
    for recital in results.recitals:
        where = "one layer" if recital.layers == 1 else f"all {recital.layers} layers"
        console.print(f"  {where}, {recital.parameters:,} trained numbers: {recital.exact} of {recital.asked} tokens")
        console.print(f"    {recital.text.strip()}", style="green", markup=False, highlight=False)
    console.rule("2. A behaviour: LoReFT beside LoRA")
    rates = "; ".join(f"{name}: r={vars(config)['r']}, lr {rate:g}" for name, (config, rate) in METHODS.items())
    console.print(
        f"{arguments.steps} steps of {BATCH} sentences, the same for all. {rates}. LoRA is on all linear layers, "
        f"LoReFT on all blocks. Judged on {len(results.held_out)} sentences about speakers never trained on."
    )
    table = Table(
        "", *(Column(name, justify="right") for name in ("trained", "ms a step", "loss", "tokens right", "exact"))
    )
    for name, row in results.methods.items():
        table.add_row(
            name,
            f"{row.parameters:,}",
            "-" if row.milliseconds is None else f"{row.milliseconds:.1f}",
            f"{row.metrics.loss:.3f}",
            f"{row.metrics.token_accuracy:.1%}",
            f"{row.metrics.exact:.1%}",
        )
    console.print(table)
    for i, example in enumerate(results.held_out[:SHOWN]):
        console.print(example.prompt, style="bold", markup=False, highlight=False)
        for name, row in results.methods.items():
            console.print(f"  {name:<14}{' '.join(row.samples[i].split())}", markup=False, highlight=False)
    console.rule("3. Saved and loaded again")
    same = "the same text" if results.same_after_reload else "DIFFERENT TEXT"
    console.print(f"PeftModel.from_pretrained writes {same} on all {len(results.held_out)} held-out sentences.")
    if arguments.output_dir:
        console.print(f"The adapter is in {arguments.output_dir}.", markup=False, highlight=False)
    console.print(f"Done in {results.seconds:.0f} s.")


def run(arguments: DemoArguments) -> int:
    """Run and report; 1 where the loaded adapter writes something else than the trained one."""
    logging.disable_progress_bar()
    console = Console()
    with _threads_for(arguments.model):
        results = demo(arguments, console)
    report(results, arguments, console)
    return 0 if results.same_after_reload else 1
