"""``fastreft train``: an adapter from a file of prompts and completions, with Transformers' Trainer."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftConfig
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

import fastreft

from .arguments import Parser, arguments_of
from .data import DataArguments, load_dataset
from .errors import UserError, user_errors
from .models import load_base, load_tokenizer, save_adapter


@dataclass
class ModelArguments:
    """What to train, and where the settings come from."""

    model: str = field(metadata={"help": "the base model: a folder, a hub id, or 'embedded' for the package's own"})
    dtype: str = field(default="auto", metadata={"help": "the base model's dtype, or 'auto' for its checkpoint's"})
    config: str | None = field(default=None, metadata={"help": "a YAML file of these settings; flags override it"})


AdapterArguments = arguments_of(fastreft.ReftConfig, PeftConfig, "AdapterArguments")


def parse(argv: Sequence[str]) -> tuple[ModelArguments, DataArguments, fastreft.ReftConfig, TrainingArguments]:
    """The settings of a run, flags over YAML over defaults; :class:`UserError` for any that is wrong."""
    parser = Parser(
        [ModelArguments, DataArguments, AdapterArguments, TrainingArguments],
        command="fastreft train",
        description="Train a ReFT adapter. Every setting can be a flag or a key of --config's YAML file.",
    )
    # The paper's learning rate and warmup; Trainer's defaults are meant for whole models.
    parser.set_defaults(learning_rate=9e-4, warmup_steps=0.1)
    parser.require("output_dir")  # TrainingArguments would make one up
    model, data, adapter, training = parser.parse_with_config(argv)
    with user_errors(ValueError, TypeError):
        config = fastreft.ReftConfig(
            task_type="CAUSAL_LM", **{name: _names(value) for name, value in vars(adapter).items()}
        )
    return model, data, config, training


def _names(value: Any) -> Any:
    """A flag's list as what it means: numbers, name endings, or one regular expression or slice, which stands alone."""
    if isinstance(value, list) and value and all(re.fullmatch(r"\d+", str(item)) for item in value):
        return [int(item) for item in value]
    if value == ["all"]:
        return "all"
    alone = isinstance(value, list) and len(value) == 1 and isinstance(value[0], str)
    return value[0] if alone and not re.fullmatch(r"[\w.]+", value[0]) else value


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
        last = get_last_checkpoint(output_dir) if os.path.isdir(output_dir) else None
        if last is None:
            raise UserError(f"there is no checkpoint in '{output_dir}' to resume from")
        return last
    if not (Path(wanted) / "trainer_state.json").is_file():
        raise UserError(f"'{wanted}' is not a checkpoint to resume from (no trainer_state.json)")
    return str(wanted)


def run(argv: Sequence[str]) -> int:
    """Train, save and report; everything is checked before anything is written."""
    model_arguments, data_arguments, config, training = parse(argv)
    output_dir = str(training.output_dir)
    checkpoint = find_checkpoint(training, output_dir)
    if Path(output_dir).exists() and not Path(output_dir).is_dir():
        raise UserError(f"output_dir '{output_dir}' is a file; give a folder")
    tokenizer = load_tokenizer(model_arguments.model)
    set_seed(training.seed)  # before the adapter's weights are drawn
    base = load_base(model_arguments.model, model_arguments.dtype)
    max_length = longest(data_arguments.max_length, base)
    train_data, cut = load_dataset(data_arguments.train_file, tokenizer, data_arguments, max_length)
    eval_data, eval_cut = None, 0
    if data_arguments.eval_file:
        eval_data, eval_cut = load_dataset(data_arguments.eval_file, tokenizer, data_arguments, max_length)
    with user_errors(ValueError, TypeError):
        model = fastreft.get_reft_model(base, config)
    optimizer = fastreft.ReftAdamW(
        fastreft.param_groups(model, lr=training.learning_rate, weight_decay=training.weight_decay),
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_epsilon,
    )
    with user_errors(ValueError):
        trainer = Trainer(
            model=model,
            args=training,
            train_dataset=train_data,
            eval_dataset=eval_data,
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            processing_class=tokenizer,
            optimizers=(optimizer, None),
        )
    if cut or eval_cut:
        print(f"note: {cut + eval_cut} completions were cut at max_length = {max_length} tokens")
    result = trainer.train(resume_from_checkpoint=checkpoint)
    eval_loss = trainer.evaluate()["eval_loss"] if eval_data is not None else None
    if trainer.is_world_process_zero():
        save_adapter(trainer.accelerator.unwrap_model(trainer.model), tokenizer, model_arguments.model, output_dir)
        trained, total = model.get_nb_trainable_parameters()
        print(f"trained {trained:,} parameters ({trained / total:.3%}) for {result.global_step} steps on "
              f"{len(train_data):,} records")  # fmt: skip
        print(f"train loss {result.training_loss:.4f}" + (f"   eval loss {eval_loss:.4f}" if eval_data else ""))
        print(f"saved to {output_dir}; try: fastreft generate --adapter {output_dir} --prompt TEXT")
    return 0
