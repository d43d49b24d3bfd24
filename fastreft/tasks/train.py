"""``fastreft train``: a model on a task or on records of your own, with Transformers' Trainer."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import broadcast_object_list
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar

import fastreft

from ..files import check_writable
from ..settings import ReftSettings
from . import methods, processes
from .checkpoints import lacks, newest_whole
from .data import Encoded, Pad, encode_labelled, encode_written, numbers_of
from .errors import UserError, user_errors
from .flags.data import DataArguments
from .flags.train import ANY, AUTO, MethodArguments, ModelArguments, parser_of, settings_of, with_positions
from .models import class_for, head_settings, load_base, load_config, load_tokenizer, longest, save_adapter
from .records import Data, gather, to_score
from .run_log import peak_memory, versions, write_log
from .scoring import metrics_for_trainer, score
from .sets import Record
from .sets.registry import CLASSIFY, GENERATE, NAMED, TAG
from .trained import is_adapter


class Settings(NamedTuple):
    """All that a run is told."""

    model: ModelArguments
    data: DataArguments
    method: MethodArguments
    adapter: dict[str, Any]
    training: TrainingArguments
    more: tuple[Any, ...] = ()  # what else a command takes


def settings(flags: Sequence[str], *more: type) -> Settings:
    """The settings of a run, of flags that :func:`fastreft.tasks.flags.train.checked` has looked at."""
    *own, model, data, method, adapter, training = parser_of(TrainingArguments, *more).parse(flags)
    methods.check_method(method.method)
    return Settings(model, data, method, settings_of(adapter), training, tuple(own))


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


class Prepared(NamedTuple):
    """What a run reads before it loads a model."""

    data: Data
    config: Any
    tokenizer: Any
    length: int  # of a record at most, in tokens
    train: Encoded
    evaluated: Encoded | None


def prepare(run: Settings) -> Prepared:
    """The records, looked at and as tokens; :class:`UserError` for what is wrong with them."""
    data = gather(run.data)
    if run.training.load_best_model_at_end and data.evaluated_on_test:
        raise UserError(
            "load_best_model_at_end would choose the model by the records that it is scored on; give --hold_out N, which "
            "keeps the last N training records for that"
        )
    _check_chosen_by(run.training, data)
    if run.method.method != methods.REFT and (unused := _of_reft(run)):
        data.notes.append(
            f"of ReFT, and of no effect with the method {run.method.method}: {', '.join(unused)} (--method_config has its own)"
        )
    run.adapter.update(with_positions(run.adapter, labelled=data.kind != GENERATE))
    named, trusts = run.model.model, run.model.trust_remote_code
    config = load_config(named, trusts)
    tokenizer = load_tokenizer(named, trust_remote_code=trusts, writes=data.kind == GENERATE)
    length = longest(run.data.max_length, config)

    numbers = numbers_of(ReftSettings(**run.adapter)) if run.method.method == methods.REFT else None
    if numbers is None and any(record.subspaces is not None for record in data.train):
        data.notes.append(f"the records name subspaces, which are ReFT's: {run.method.method} trains on all alike")

    def encode(records: Sequence[Record]) -> Encoded:
        limits: dict[str, Any] = {"max_length": length, "too_long": run.data.too_long}
        if data.kind != GENERATE:
            if run.data.completion_tokens is not None:
                raise UserError("completion_tokens is of records to write, and these are labelled: leave it out")
            return encode_labelled(records, tokenizer, data.kind, data.labels, **limits)
        apart = bool(config.is_encoder_decoder)
        return encode_written(
            records,
            tokenizer,
            chat=run.data.chat,
            apart=apart,
            numbers=numbers,
            completion_tokens=run.data.completion_tokens,
            **limits,
        )

    evaluated = encode(data.evaluated) if data.evaluated else None
    return Prepared(data, config, tokenizer, length, encode(data.train), evaluated)


def _of_reft(run: Settings) -> list[str]:
    """The settings of ReFT alone that are given."""
    usual = {field.name: field.default for field in fields(ReftSettings)} | {"positions": ANY}
    found = [name for name, value in run.adapter.items() if name in usual and value != usual[name]]
    return found + ["r_lr_scale"] * (run.method.r_lr_scale != MethodArguments.r_lr_scale)


def _check_chosen_by(training: TrainingArguments, data: Data) -> None:
    """:class:`UserError` for a metric_for_best_model that an evaluation will not have."""
    wanted, metrics = training.metric_for_best_model, () if data.kind == GENERATE else data.metrics
    if wanted is not None and wanted.removeprefix("eval_") not in ("loss", *metrics):
        raise UserError(
            f"metric_for_best_model is {wanted!r}; an evaluation of these records has {', '.join(('loss', *metrics))}"
        )


def make_model(run: Settings, ready: Prepared) -> Any:
    """The model, ready to train, on the device that it trains on; a rate that is to be found is in the settings."""
    kind, task_type = class_for(ready.data.kind, ready.config)
    if run.method.head_lr_scale not in (None, 1) and run.method.method != methods.REFT and ready.data.kind == GENERATE:
        raise UserError(
            f"head_lr_scale is {run.method.head_lr_scale}, and a model that writes has no head of the task's own"
        )
    with user_errors(ValueError, TypeError):
        adapter = fastreft.ReftConfig(task_type=task_type, **run.adapter)
    set_seed(run.training.seed)  # before the weights of an adapter, or of a head, are drawn
    base = load_base(
        run.model.model, run.model.dtype, run.model.trust_remote_code, kind=kind, use_cpu=run.training.use_cpu,
        **head_settings(ready.data.kind, ready.data.labels, ready.tokenizer),
    )  # fmt: skip
    model = methods.apply(base, run.method.method, adapter, run.method.settings(), task_type)
    if run.training.learning_rate is AUTO:
        model.to(run.training.device)
        found = methods.suited_rate(model, run.method.method)
        (run.training.learning_rate,) = broadcast_object_list([found])  # processes may run on different devices
        said = f"learning_rate is {run.training.learning_rate:g}"
        if run.method.head_lr_scale is None and ready.data.kind == CLASSIFY and run.method.method != methods.HEAD:
            scale = run.method.head_lr_scale = methods.suited_head_scale(len(ready.data.labels))
            said += f", the head's {scale:g} times that" if scale != 1 else ""
        ready.data.notes.append(f"{said}, as it is left to auto")
    return model


class TaskTrainer(Trainer):
    """Trainer with :class:`fastreft.ReftAdamW` for ReFT, made when Trainer asks for it: with FSDP it takes none made before."""

    def __init__(self, mine: Settings, **given: Any):
        self.mine = mine
        super().__init__(**given)
        # It takes every model with keywords for one that does, and leaves the others' accumulated losses undivided. Its own
        # smoothed loss does, whatever the model.
        divides = methods.divides_by_all_tokens(self.model) or bool(self.args.label_smoothing_factor)
        self.model_accepts_loss_kwargs = self.model_accepts_loss_kwargs and divides

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The optimizer of the method, or Trainer's own."""
        made = self.optimizer
        if made is None:
            self.optimizer = methods.optimizer_of(self.model, self.mine.method, self.args)
        optimizer = super().create_optimizer(*args, **kwargs)
        if made is None:
            methods.give_head_its_rate(optimizer, self.model, self.mine.method)
        return optimizer


def _make_trainer(run: Settings, ready: Prepared, model: Any) -> TaskTrainer:
    """Trainer; :class:`UserError` for what it refuses, and where accelerate would leave out what was asked for."""
    with user_errors(ValueError, RuntimeError, ImportError):
        trainer = TaskTrainer(run, model=model, **trainer_settings(run, ready))
    shards = {
        "fsdp": (run.training.fsdp, trainer.is_fsdp_enabled),
        "deepspeed": (run.training.deepspeed_plugin, trainer.is_deepspeed_enabled),
    }
    for name, (wanted, done) in shards.items():
        if wanted and not done:
            raise UserError(
                f"{name} is given, and accelerate shards nothing on this device ({run.training.device.type}); leave it out: "
                "every process then has the whole model"
            )
    return trainer


def _save(
    model: Any, tokenizer: Any, base: str, output_dir: str, log: dict[str, Any], weights: dict[str, Any] | None
) -> None:
    """What was trained into ``output_dir``, and where that has become impossible, somewhere: a training is not lost for it."""
    try:
        save_adapter(model, tokenizer, base, output_dir, log, weights)
    except OSError as error:
        elsewhere = tempfile.mkdtemp(prefix="fastreft-")
        save_adapter(model, tokenizer, base, elsewhere, log, weights)
        raise UserError(
            f"cannot write into '{output_dir}' ({error}); the trained adapter is in '{elsewhere}'"
        ) from error


def _score_all(run: Settings, ready: Prepared, model: Any) -> Iterator[dict[str, dict[str, float]]]:
    """The tasks' test records scored, a line printed for each: after each, all scores so far."""
    found = {}
    model.eval()
    for task in ready.data.scored:
        if not task.metrics:
            continue  # judged elsewhere: fastreft eval writes what is
        result = score(
            task,
            to_score(task, run.data),
            model,
            ready.tokenizer,
            labels=ready.data.labels,
            chat=run.data.chat,
            batch_size=run.training.per_device_eval_batch_size,
            max_length=ready.length,
        )
        _say(result.in_words())
        found[task.name] = {**result.metrics, "records": result.records, "unparsed": result.unparsed}
        yield found


def trainer_settings(run: Settings, ready: Prepared) -> dict[str, Any]:
    """What Trainer is given besides a model and its optimizer."""
    data = ready.data
    pads = {GENERATE: DataCollatorForSeq2Seq, TAG: DataCollatorForTokenClassification}
    pad: Any = Pad(pads.get(data.kind, DataCollatorWithPadding)(ready.tokenizer))
    smoothed = run.training.label_smoothing_factor and data.kind == GENERATE and run.method.method == methods.REFT
    callbacks: list[Any] = [EarlyStoppingCallback(run.method.early_stopping)] if run.method.early_stopping else []
    callbacks += methods.callbacks_of(run.method, run.training)
    return {
        "args": run.training,
        "train_dataset": ready.train.data,
        "eval_dataset": ready.evaluated.data if ready.evaluated else None,
        "data_collator": partial(with_answers, pad) if smoothed else pad,
        "processing_class": ready.tokenizer,
        "compute_metrics": metrics_for_trainer(data.kind, data.metrics, data.labels),
        "callbacks": callbacks,
    }


def data_notes(ready: Prepared) -> list[str]:
    """What was done to the records, and chosen."""
    notes = list(ready.data.notes)
    for what, encoded in (("training", ready.train), ("evaluation", ready.evaluated)):
        if encoded and encoded.cut:
            notes.append(f"{encoded.cut} {what} records were cut at max_length = {ready.length} tokens")
        if encoded and encoded.dropped:
            notes.append(
                f"{encoded.dropped} {what} records longer than max_length = {ready.length} tokens were left out"
            )
    return notes


def _say(text: str) -> None:
    """A line on stdout, of one process of several."""
    if processes.is_first():
        print(text)


def run(flags: Sequence[str]) -> int:
    """Train, save, score and report; everything is checked before anything is written. Of several processes, all train, and
    the first saves, scores and reports; where each holds a shard of the model, all have a part in the scoring."""
    run = settings(flags)
    if processes.count() > run.training.world_size:
        raise UserError(
            f"there are {processes.count()} processes, and no accelerator here over which they could work together; give "
            "--use_cpu to have them train on the CPU"
        )
    if not processes.is_first():
        disable_progress_bar()
    output_dir = str(run.training.output_dir)
    adapted = run.method.method not in (methods.FULL, methods.HEAD, methods.LAST)
    if not adapted and is_adapter(output_dir):
        raise UserError(
            f"output_dir '{output_dir}' holds an adapter, for which a whole model beside it would be taken; give another folder"
        )
    checkpoint = find_checkpoint(run.training, output_dir, adapter=adapted)
    with user_errors(OSError, prefix=f"cannot write into output_dir '{output_dir}': "):
        check_writable(output_dir)
    if not torch.cuda.is_available():
        run.training.dataloader_pin_memory = False  # which torch would warn of, each epoch
    ready = prepare(run)
    model = make_model(run, ready)
    trainer = _make_trainer(run, ready, model)
    notes = data_notes(ready)
    if processes.is_alone_of_several() and run.training.world_size == 1:
        notes.append(
            "accelerate launch was asked for several processes and has started one; on a CPU, give it --multi_gpu, and "
            "--use_cpu true to the training"
        )
    for note in notes:
        _say(f"note: {note}")
    with user_errors(FloatingPointError, prefix="the training diverged; try a lower learning_rate: "):
        result = trainer.train(resume_from_checkpoint=checkpoint)
    measured = trainer.evaluate() if ready.evaluated is not None else {}
    sharded = trainer.is_fsdp_enabled
    weights = trainer.accelerator.get_state_dict(trainer.model) if sharded else None  # which takes all processes
    if not (sharded or processes.is_first()):
        return 0
    whole = trainer.accelerator.unwrap_model(trainer.model)
    trained, total = methods.counts(whole)
    log = {
        "model": run.model.model,
        "method": run.method.method,
        "task": run.data.task,
        "kind": ready.data.kind,
        "labels": list(ready.data.labels) if ready.data.kind in NAMED else None,
        "chat": run.data.chat or run.data.messages_field is not None,
        "dtype": run.model.dtype,
        "max_length": ready.length,
        "learning_rate": run.training.learning_rate,
        "trained_numbers": trained,
        "steps": result.global_step,
        "train_records": len(ready.train.data),
        "train_loss": result.training_loss,
        "train_seconds": result.metrics["train_runtime"],
        "peak_memory_bytes": peak_memory(),
        "evaluation": measured,
        "history": trainer.state.log_history,
        "notes": notes,
        "settings": list(flags),
        "versions": versions(),
    }
    if processes.is_first():
        _save(whole, ready.tokenizer, run.model.model, output_dir, log, weights)
    _say(f"trained {trained:,} parameters ({trained / total:.3%}) for {result.global_step} steps on "
         f"{len(ready.train.data):,} records")  # fmt: skip
    names = ("loss", *ready.data.metrics)
    shown = [f"eval {name} {measured[f'eval_{name}']:.4f}" for name in names if f"eval_{name}" in measured]
    _say("   ".join([f"train loss {result.training_loss:.4f}", *shown]))
    if not math.isfinite(measured.get("eval_loss", result.training_loss)):
        _say("note: the loss is no number: what has been trained is of no use")
    for scores in _score_all(run, ready, whole):
        if processes.is_first():
            write_log(output_dir, {**log, "scores": scores})
    _say(f"saved to {output_dir}{_next(run, ready.data, output_dir)}")
    return 0


def _next(run: Settings, data: Data, output_dir: str) -> str:
    """The command that one would try then, if there is one; with the module that may have registered the edit, or the task."""
    own = "" if run.data.task_module is None else f" --task_module {run.data.task_module}"
    if data.kind == GENERATE and run.method.method == methods.REFT:
        return f"; try: fastreft generate --adapter {output_dir}{own} --prompt TEXT"
    return f"; try: fastreft eval --adapter {output_dir}{own}" if run.data.task else ""
