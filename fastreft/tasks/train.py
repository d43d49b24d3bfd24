"""``fastreft train``: an adapter from a file of prompts and completions, with Transformers' Trainer."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments, set_seed

import fastreft

from ..files import check_writable
from .checkpoints import lacks, newest_whole
from .data import load_dataset
from .errors import UserError, user_errors
from .flags.train import DataArguments, ModelArguments, parser_of, settings_of
from .models import load_base, load_tokenizer, save_adapter


def settings(flags: Sequence[str]) -> tuple[ModelArguments, DataArguments, fastreft.ReftConfig, TrainingArguments]:
    """The settings of a run, of flags that :func:`fastreft.tasks.flags.train.parse` has looked at."""
    model, data, adapter, training = parser_of(TrainingArguments).parse(flags)
    with user_errors(ValueError, TypeError):
        return model, data, fastreft.ReftConfig(task_type="CAUSAL_LM", **settings_of(adapter)), training


def longest(max_length: int | None, model: Any) -> int:
    """The tokens that a record may have: what the user asked for, within what the model can take."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if max_length is None:
        return min(512, context or 512)
    if max_length < 2:
        raise UserError(f"max_length is {max_length}; a prompt and a completion need at least 2 tokens")
    if context and max_length > context:
        raise UserError(f"max_length is {max_length}, but the model's context is {context} tokens")
    return max_length


def find_checkpoint(training: TrainingArguments, output_dir: str) -> str | None:
    """The checkpoint that ``resume_from_checkpoint`` means: a folder, or the last one where it is "true"."""
    wanted = training.resume_from_checkpoint
    if wanted is None or str(wanted).lower() == "false":
        return None
    if str(wanted).lower() == "true":
        return newest_whole(output_dir)
    missing = lacks(Path(wanted).expanduser())
    if missing is not None:
        raise UserError(f"'{wanted}' is not a checkpoint to resume from ({missing})")
    return str(wanted)


def with_answers(pad: Any, records: Any) -> Any:
    """A batch whose labels Trainer takes off it for the loss, with a copy that tells the model where the prompts end."""
    batch = pad(records)
    batch["reft_labels"] = batch["labels"]
    return batch


def _save(model: Any, tokenizer: Any, base: str, output_dir: str) -> None:
    """The adapter into ``output_dir``, and where that has become impossible, somewhere: a training is not lost for it."""
    try:
        save_adapter(model, tokenizer, base, output_dir)
    except OSError as error:
        elsewhere = tempfile.mkdtemp(prefix="fastreft-")
        save_adapter(model, tokenizer, base, elsewhere)
        raise UserError(
            f"cannot write into '{output_dir}' ({error}); the trained adapter is in '{elsewhere}'"
        ) from error


def run(flags: Sequence[str]) -> int:
    """Train, save and report; everything is checked before anything is written."""
    model_arguments, data_arguments, config, training = settings(flags)
    output_dir = str(training.output_dir)
    checkpoint = find_checkpoint(training, output_dir)
    with user_errors(OSError, prefix=f"cannot write into output_dir '{output_dir}': "):
        check_writable(output_dir)
    trusts = model_arguments.trust_remote_code
    tokenizer = load_tokenizer(model_arguments.model, trust_remote_code=trusts)
    set_seed(training.seed)  # before the adapter's weights are drawn
    base = load_base(model_arguments.model, model_arguments.dtype, trust_remote_code=trusts)
    max_length = longest(data_arguments.max_length, base)
    train_data, cut = load_dataset(data_arguments.train_file, tokenizer, data_arguments, max_length)
    eval_data, eval_cut = None, 0
    if data_arguments.eval_file:
        eval_data, eval_cut = load_dataset(data_arguments.eval_file, tokenizer, data_arguments, max_length)
    with user_errors(ValueError, TypeError):
        model = fastreft.get_reft_model(base, config)
    pad = DataCollatorForSeq2Seq(tokenizer)
    with user_errors(ValueError, RuntimeError, ImportError):
        optimizer = fastreft.ReftAdamW(
            fastreft.param_groups(model, lr=training.learning_rate, weight_decay=training.weight_decay),
            betas=(training.adam_beta1, training.adam_beta2),
            eps=training.adam_epsilon,
        )
        trainer = Trainer(
            model=model,
            args=training,
            train_dataset=train_data,
            eval_dataset=eval_data,
            data_collator=partial(with_answers, pad) if training.label_smoothing_factor else pad,
            processing_class=tokenizer,
            optimizers=(optimizer, None),
        )
    if cut or eval_cut:
        print(f"note: {cut + eval_cut} completions were cut at max_length = {max_length} tokens")
    with user_errors(FloatingPointError, prefix="the training diverged; try a lower learning_rate: "):
        result = trainer.train(resume_from_checkpoint=checkpoint)
    eval_loss = trainer.evaluate()["eval_loss"] if eval_data is not None else None
    if trainer.is_world_process_zero():
        _save(trainer.accelerator.unwrap_model(trainer.model), tokenizer, model_arguments.model, output_dir)
        trained, total = model.get_nb_trainable_parameters()
        print(f"trained {trained:,} parameters ({trained / total:.3%}) for {result.global_step} steps on "
              f"{len(train_data):,} records")  # fmt: skip
        print(f"train loss {result.training_loss:.4f}" + (f"   eval loss {eval_loss:.4f}" if eval_data else ""))
        print(f"saved to {output_dir}; try: fastreft generate --adapter {output_dir} --prompt TEXT")
    return 0
