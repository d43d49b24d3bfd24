"""pyreft's trainers: Transformers' Trainer with locations in the batch, the native optimizer, and pyreft's checkpoints."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Trainer

from ..optim import ReftAdamW, param_groups
from .checkpoint import TRAINER_FOLDER
from .model import ReftModel


class ReftTrainer(Trainer):
    """Trains a :class:`ReftModel` on batches with ``intervention_locations`` (B, interventions, n), and ``subspaces`` likewise.

    ``tokenizer`` is Trainer's ``processing_class``. AdamW is :class:`fastreft.ReftAdamW`, so that weight decay reaches
    W, b and P and never R. Checkpoints are written into ``intervenable_model``, over an earlier one's; evaluation, resuming and
    loading the best model work as with any Trainer.
    """

    model: ReftModel

    def __init__(self, model: Any = None, args: Any = None, *rest: Any, tokenizer: Any = None, **kwargs: Any):
        if not isinstance(model, ReftModel):
            raise TypeError(
                f"model is a {type(model).__name__}; it must be a fastreft.pyreft.ReftModel, as fastreft.pyreft.get_reft_model "
                "makes; a PEFT model of fastreft's takes Transformers' own Trainer"
            )
        if tokenizer is not None:
            kwargs.setdefault("processing_class", tokenizer)
        if args is not None:
            args.remove_unused_columns = False  # the locations are one
        super().__init__(model, args, *rest, **kwargs)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """:class:`fastreft.ReftAdamW` where the arguments ask for AdamW, else Trainer's choice."""
        if self.optimizer is None and self.args.optim in ("adamw_torch", "adamw_torch_fused"):
            self.optimizer = ReftAdamW(
                param_groups(self.model, lr=self.args.learning_rate, weight_decay=self.args.weight_decay),
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
            )
        return super().create_optimizer(model)

    def _run(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        """The edited model's output on a batch."""
        chosen = inputs.get("subspaces")
        if chosen is not None and chosen.ndim != 3:
            raise ValueError(
                f"subspaces in a batch has shape {tuple(chosen.shape)}; it must be (batch, interventions, rows)"
            )
        located = inputs.get("intervention_locations")
        where = None if located is None else {"sources->base": (None, located.permute(1, 0, 2))}
        base = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
        chosen = None if chosen is None else chosen.permute(1, 0, 2)
        return model(base, unit_locations=where, subspaces=chosen, labels=inputs.get("labels"))[1]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The model's own loss, a mean over the batch."""
        output = self._run(model, inputs)
        return (output.loss, output) if return_outputs else output.loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """``output_dir/intervenable_model``: the interventions, and the base model's weights that train."""
        if self.args.should_save:
            self.model.save(os.path.join(output_dir or str(self.args.output_dir), TRAINER_FOLDER), include_model=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.model.load_intervention(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self.model.load_intervention(str(self.state.best_model_checkpoint))


class ReftTrainerForCausalLM(ReftTrainer):
    """The trainer of a causal language model."""


class ReftTrainerForCausalLMDistributed(ReftTrainerForCausalLM):
    """The same: Trainer itself gives each process its share and lets one of them save."""


class ReftTrainerForSequenceClassification(ReftTrainer):
    """The trainer of a classifier; the loss follows the model's ``problem_type``, or its labels as Transformers tells it."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean squared error, cross-entropy, or binary cross-entropy with several labels, in the logits' dtype."""
        labels = inputs["labels"]
        output = self._run(model, {name: value for name, value in inputs.items() if name != "labels"})
        logits, base = output.logits, self.model.model
        problem = base.config.problem_type  # type: ignore[union-attr]
        if problem is None:
            whole = labels.dtype in (torch.long, torch.int)
            one = base.num_labels == 1
            problem = "regression" if one else f"{'single' if whole else 'multi'}_label_classification"
        if problem == "regression":
            loss = F.mse_loss(logits.view(labels.shape), labels.to(logits.dtype))
        elif problem == "single_label_classification":
            loss = F.cross_entropy(logits.view(-1, logits.shape[-1]), labels.view(-1))
        else:
            loss = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
        return (loss, output) if return_outputs else loss
