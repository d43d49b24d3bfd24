"""``fastreft train``: a model on a task or on records of your own, with Transformers' Trainer."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

import fastreft

from ..files import check_writable
from . import methods
from .checkpoints import lacks, newest_whole
from .data import Encoded, encode_labelled, encode_written
from .errors import UserError, user_errors
from .flags.data import DataArguments
from .flags.train import AUTO, MethodArguments, ModelArguments, parser_of, settings_of
from .models import class_for, head_settings, load_base, load_config, load_tokenizer, save_adapter
from .records import Data, gather, to_score
from .run_log import peak_memory, versions, write_log
from .scoring import metrics_for_trainer, score
from .sets import Record
from .sets.registry import CLASSIFY, GENERATE


class Settings(NamedTuple):
    """All that a run is told."""

    model: ModelArguments
    data: DataArguments
    method: MethodArguments
    adapter: dict[str, Any]
    training: TrainingArguments


def settings(flags: Sequence[str]) -> Settings:
    """The settings of a run, of flags that :func:`fastreft.tasks.flags.train.parse` has looked at."""
    model, data, method, adapter, training = parser_of(TrainingArguments).parse(flags)
    methods.check_method(method.method)
    return Settings(model, data, method, settings_of(adapter), training)


def longest(max_length: int | None, config: Any) -> int:
    """The tokens that a record may have: what the user asked for, within what the model can take."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if max_length is None:
        return min(512, context or 512)
    if max_length < 2:
        raise UserError(f"max_length is {max_length}; a prompt and a completion need at least 2 tokens")
    if context and max_length > context:
        raise UserError(f"max_length is {max_length}, but the model's context is {context} tokens")
    return max_length


def find_checkpoint(training: TrainingArguments, output_dir: str, *, adapter: bool) -> str | None:
    """The checkpoint that ``resume_from_checkpoint`` means: a folder, or the last one where it is "true"."""
    wanted = training.resume_from_checkpoint
    if wanted is None or str(wanted).lower() == "false":
        return None
    if str(wanted).lower() == "true":
        return newest_whole(output_dir, adapter=adapter)
    missing = lacks(Path(wanted).expanduser(), adapter=adapter)
    if missing is not None:
        raise UserError(f"'{wanted}' is not a checkpoint to resume from ({missing})")
    return str(wanted)


def with_answers(pad: Any, records: Any) -> Any:
    """A batch whose labels Trainer takes off it for the loss, with a copy that tells the model where the prompts end."""
    batch = pad(records)
    batch["reft_labels"] = batch["labels"]
    return batch


def _encode(records: Sequence[Record], data: Data, run: Settings, tokenizer: Any, config: Any, length: int) -> Encoded:
    if data.kind != GENERATE:
        return encode_labelled(
            records, tokenizer, data.kind, data.labels, max_length=length, too_long=run.data.too_long
        )
    apart = bool(config.is_encoder_decoder)
    return encode_written(
        records, tokenizer, max_length=length, too_long=run.data.too_long, chat=run.data.chat, apart=apart
    )


def _save(model: Any, tokenizer: Any, base: str, output_dir: str, log: dict[str, Any]) -> None:
    """What was trained into ``output_dir``, and where that has become impossible, somewhere: a training is not lost for it."""
    try:
        save_adapter(model, tokenizer, base, output_dir, log)
    except OSError as error:
        elsewhere = tempfile.mkdtemp(prefix="fastreft-")
        save_adapter(model, tokenizer, base, elsewhere, log)
        raise UserError(
            f"cannot write into '{output_dir}' ({error}); the trained adapter is in '{elsewhere}'"
        ) from error


def _score_all(run: Settings, data: Data, model: Any, tokenizer: Any, length: int) -> dict[str, dict[str, float]]:
    """The tasks' test records scored, a line printed for each."""
    found = {}
    model.eval()
    for task in data.scored:
        if not task.metrics:
            continue  # judged elsewhere: fastreft eval writes what is
        result = score(
            task,
            to_score(task, run.data),
            model,
            tokenizer,
            labels=data.labels,
            chat=run.data.chat,
            batch_size=run.training.per_device_eval_batch_size,
            max_length=length,
        )
        print(result.in_words())
        found[task.name] = {**result.metrics, "records": result.records, "unparsed": result.unparsed}
    return found


def _trainer(
    run: Settings, data: Data, model: Any, tokenizer: Any, train: Encoded, evaluated: Encoded | None
) -> Trainer:
    if data.kind == GENERATE:
        pad: Any = DataCollatorForSeq2Seq(tokenizer)
    else:
        pad = DataCollatorWithPadding(tokenizer)
    smoothed = run.training.label_smoothing_factor and data.kind == GENERATE and run.method.method == methods.REFT
    names = data.scored[0].metrics if data.scored else ("accuracy",)
    stopping: list[Any] = [EarlyStoppingCallback(run.method.early_stopping)] if run.method.early_stopping else []
    return Trainer(
        model=model,
        args=run.training,
        train_dataset=train.data,
        eval_dataset=evaluated.data if evaluated else None,
        data_collator=partial(with_answers, pad) if smoothed else pad,
        processing_class=tokenizer,
        optimizers=(methods.optimizer_of(model, run.method.method, run.training, run.method.r_lr_scale), None),
        compute_metrics=metrics_for_trainer(data.kind, names),
        callbacks=stopping,
    )


def run(flags: Sequence[str]) -> int:
    """Train, save, score and report; everything is checked before anything is written."""
    run = settings(flags)
    adapted = run.method.method not in (methods.FULL, methods.HEAD, methods.LAST)
    output_dir = str(run.training.output_dir)
    checkpoint = find_checkpoint(run.training, output_dir, adapter=adapted)
    with user_errors(OSError, prefix=f"cannot write into output_dir '{output_dir}': "):
        check_writable(output_dir)
    data = gather(run.data)
    named, trusts = run.model.model, run.model.trust_remote_code
    config = load_config(named, trusts)
    tokenizer = load_tokenizer(named, trust_remote_code=trusts, writes=data.kind == GENERATE)
    length = longest(run.data.max_length, config)
    train = _encode(data.train, data, run, tokenizer, config, length)
    evaluated = _encode(data.evaluated, data, run, tokenizer, config, length) if data.evaluated else None
    kind, task_type = class_for(data.kind, config)
    with user_errors(ValueError, TypeError):
        adapter = fastreft.ReftConfig(task_type=task_type, **run.adapter)
    if not torch.cuda.is_available():
        run.training.dataloader_pin_memory = False  # which torch would warn of, each epoch
    set_seed(run.training.seed)  # before the weights of an adapter, or of a head, are drawn
    base = load_base(
        named, run.model.dtype, trusts, kind=kind, use_cpu=run.training.use_cpu,
        **head_settings(data.kind, data.labels, tokenizer),
    )  # fmt: skip
    model = methods.apply(base, run.method.method, adapter, run.method.settings(), task_type)
    notes = list(data.notes)
    if run.training.learning_rate is AUTO:
        model.to(run.training.device)
        run.training.learning_rate = methods.suited_rate(model, run.method.method)
        notes.append(
            f"learning_rate is {run.training.learning_rate:g}, which suits this model and what is trained of it"
        )
    with user_errors(ValueError, RuntimeError, ImportError):
        trainer = _trainer(run, data, model, tokenizer, train, evaluated)
    for what, encoded in (("training", train), ("evaluation", evaluated)):
        if encoded and encoded.cut:
            notes.append(f"{encoded.cut} {what} records were cut at max_length = {length} tokens")
        if encoded and encoded.dropped:
            notes.append(f"{encoded.dropped} {what} records longer than max_length = {length} tokens were left out")
    for note in notes:
        print(f"note: {note}")
    with user_errors(FloatingPointError, prefix="the training diverged; try a lower learning_rate: "):
        result = trainer.train(resume_from_checkpoint=checkpoint)
    measured = trainer.evaluate() if evaluated is not None else {}
    if trainer.is_world_process_zero():
        whole = trainer.accelerator.unwrap_model(trainer.model)
        trained, total = methods.counts(whole)
        log = {
            "model": named,
            "method": run.method.method,
            "task": run.data.task,
            "kind": data.kind,
            "labels": list(data.labels) if data.kind == CLASSIFY else None,
            "chat": run.data.chat,
            "dtype": run.model.dtype,
            "max_length": length,
            "learning_rate": run.training.learning_rate,
            "trained_numbers": trained,
            "steps": result.global_step,
            "train_records": len(train.data),
            "train_loss": result.training_loss,
            "train_seconds": result.metrics["train_runtime"],
            "peak_memory_bytes": peak_memory(),
            "evaluation": measured,
            "notes": notes,
            "settings": list(flags),
            "versions": versions(),
        }
        _save(whole, tokenizer, named, output_dir, log)
        print(f"trained {trained:,} parameters ({trained / total:.3%}) for {result.global_step} steps on "
              f"{len(train.data):,} records")  # fmt: skip
        figures = {name.removeprefix("eval_"): value for name, value in measured.items() if name.startswith("eval_")}
        shown = [
            f"eval {name} {figures[name]:.4f}"
            for name in ("loss", "accuracy", "matthews", "pearson")
            if name in figures
        ]
        print("   ".join([f"train loss {result.training_loss:.4f}", *shown]))
        scores = _score_all(run, data, whole, tokenizer, length)
        if scores:
            write_log(output_dir, {**log, "scores": scores})
        print(f"saved to {output_dir}; try: {_next(run, data, output_dir)}")
    return 0


def _next(run: Settings, data: Data, output_dir: str) -> str:
    """The command that one would try then."""
    if data.kind == GENERATE and run.method.method == methods.REFT:
        chat = " --chat" if run.data.chat or run.data.messages_field else ""
        return f"fastreft generate --adapter {output_dir} --prompt TEXT{chat}"
    task = f" --task {run.data.task}" if run.data.task else " --eval_file FILE"
    return f"fastreft eval --adapter {output_dir}{task}"
