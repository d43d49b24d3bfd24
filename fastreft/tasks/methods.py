"""What is trained of a model: a ReFT adapter, any other of PEFT's, the head, the last block, or everything.

One road for all, so that a comparison shares code, data order and seed.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType
from transformers import TrainerCallback

import fastreft

from ..models.blocks import find_blocks
from ..tuner.loading import layers_of
from ..tuner.model import quiet_peft
from .errors import UserError, nearest, user_errors
from .flags.train import MethodArguments

REFT, FULL, HEAD, LAST = "reft", "full", "head", "last"


def methods() -> list[str]:
    """The names that --method takes."""
    return [
        REFT,
        FULL,
        HEAD,
        LAST,
        *sorted(kind.value.lower() for kind in PEFT_TYPE_TO_CONFIG_MAPPING if kind != "REFT"),
    ]


def check_method(name: str) -> None:
    """:class:`UserError` for a method that there is not."""
    if name not in methods():
        raise UserError(f"method is {name!r}; it must be one of {', '.join(methods())}{nearest(name, methods())}")


def apply(base: Any, method: str, config: Any, settings: dict[str, Any], task_type: str) -> Any:
    """``base`` made ready to train: a PeftModel, or itself with the right parameters requiring gradients.

    ``config``: the :class:`fastreft.ReftConfig` of "reft"; ``settings`` of --method_config for any other of PEFT's.
    """
    if method == REFT:
        with user_errors(ValueError, TypeError):
            return fastreft.get_reft_model(base, config)
    if method in (FULL, HEAD, LAST):
        if settings:
            raise UserError(f"method_config is {settings!r}; the method '{method}' takes none")
        _choose(base, method)
        return base
    made = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method.upper())]
    if "num_virtual_tokens" in made.__dataclass_fields__ and settings.get("num_virtual_tokens") is None:
        raise UserError(
            f"the method '{method}' needs --method_config '{{\"num_virtual_tokens\": 20}}', or another number"
        )
    with user_errors(ValueError, TypeError, KeyError, ImportError, prefix=f"the method '{method}': "), quiet_peft():
        return get_peft_model(base, made(task_type=task_type, **settings))


def divides_by_all_tokens(model: Any) -> bool:
    """Whether a model's loss is a mean over the tokens of all batches of a step, of which Trainer tells it the number: by the
    code of its forward, which hands that on to Transformers' loss of a causal language model, or does not."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    try:
        code = ast.parse(textwrap.dedent(inspect.getsource(type(base).forward)))
    except (OSError, TypeError, SyntaxError):
        return False
    calls = [
        call for call in ast.walk(code) if isinstance(call, ast.Call) and any(k.arg is None for k in call.keywords)
    ]
    return any(isinstance(call.func, ast.Attribute) and call.func.attr == "loss_function" for call in calls)


class Allocation(TrainerCallback):
    """AdaLoRA's share of ranks among its matrices, which PEFT wants told of every step."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        given["model"].base_model.update_and_allocate(state.global_step)


def callbacks_of(settings: MethodArguments, training: Any) -> list[Any]:
    """What Trainer calls for a method's sake."""
    if settings.method == REFT and training.deepspeed_plugin:
        return [fastreft.ZeroRetraction(settings.r_lr_scale)]
    return [Allocation()] if settings.method == "adalora" else []


def head_of(base: Any) -> list[torch.nn.Module]:
    """What stands behind a model's blocks and is the task's own: a classifier's layers."""
    inner = getattr(base, base.base_model_prefix, None)
    return [module for module in base.children() if module is not inner and any(True for _ in module.parameters())]


def _choose(base: Any, method: str) -> None:
    """Gradients for a part of a model alone."""
    if method == FULL:
        return
    base.requires_grad_(False)
    head = head_of(base)
    embedded = base.get_output_embeddings()
    if method == HEAD and (not head or embedded is not None):
        raise UserError("the method 'head' trains a classifier's head, and this model has none; take 'last'")
    for module in [*head, *(find_blocks(base).modules[-1:] if method == LAST else [])]:
        if module is not embedded:
            module.requires_grad_(True)


def optimizer_of(model: Any, settings: MethodArguments, training: Any) -> Any:
    """:class:`fastreft.ReftAdamW` for ReFT, whose Rs it keeps orthonormal; None else: Trainer's own AdamW."""
    if settings.method != REFT:
        return None
    return fastreft.ReftAdamW(
        fastreft.param_groups(model, lr=training.learning_rate, weight_decay=training.weight_decay),
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_epsilon,
        r_lr_scale=settings.r_lr_scale,
    )


def give_head_its_rate(optimizer: Any, model: Any, settings: MethodArguments) -> None:
    """A new optimizer's groups apart, the head's with ``head_lr_scale`` times the rate; with ReFT all but the edits is head."""
    if settings.head_lr_scale in (None, 1):
        return
    if settings.method == REFT:
        edits = {id(p) for layer in layers_of(model) for p in layer.parameters()}
        head = {id(p) for p in model.parameters()} - edits
    else:
        modules = head_of(model.get_base_model() if isinstance(model, PeftModel) else model)
        head = {id(p) for module in modules for p in module.parameters()}
    apart = []
    for group in optimizer.param_groups:
        own = [p for p in group["params"] if id(p) in head]
        if own:
            group["params"] = [p for p in group["params"] if id(p) not in head]
            apart.append({**group, "params": own, "lr": settings.head_lr_scale * group["lr"]})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    for group in apart:
        optimizer.add_param_group(group)


# Where nothing is measured: rates that others use.
_USUAL = {FULL: 1e-4, HEAD: 1e-1, LAST: 1e-3}


def suited_rate(model: Any, method: str) -> float:
    """:func:`fastreft.suggest_lr`'s for ReFT; for other methods a usual one."""
    if method != REFT:
        return _USUAL.get(method, 1e-3)
    with user_errors(ValueError, RuntimeError, TypeError, prefix="no learning_rate could be found, give one: "):
        return fastreft.suggest_lr(model)


def suited_head_scale(labels: int) -> float:
    """A head's rate as a multiple of all else's: each of many labels is seen that much more rarely than either of two."""
    return max(1.0, labels / 2)


def counts(model: Any) -> tuple[int, int]:
    """(numbers that are trained, all numbers)."""
    if isinstance(model, PeftModel):
        return model.get_nb_trainable_parameters()
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)
