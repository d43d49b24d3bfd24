"""Adapters in lm-evaluation-harness: its model ``reft``, and its command line with that model in it.

``python -m fastreft.tasks.harness run --model reft --model_args peft=FOLDER --tasks ...`` is ``lm_eval`` with the method known
to PEFT. Where the harness scores an answer, prompt and answer are one input, of which its model ``hf`` says nothing more: all
of it would be edited as a prompt, "l5" being the last tokens of the answer. ``reft`` tells the model where each prompt ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import fastreft  # noqa: F401  # registers the method with PEFT

from ..settings import ReftSettings
from .errors import UserError
from .models import dtype_of, reft_config
from .places import find_model

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError("fastreft.tasks.harness needs lm-evaluation-harness: pip install 'fastreft[harness]'") from error

# (what the harness remembers it by, the tokens of the context, those of the continuation)
Request = tuple[Any, list[int], list[int]]


@register_model("reft")
class ReftLM(HFLM):
    """The harness's model of Transformers' with a ReFT adapter, whose edits see the prompts that ``generate`` would see.

    ``pretrained``: the base model, a name or a folder, the one that the adapter names if not given, or a model with an adapter
    on it. ``peft``: the adapter's folder. ``dtype``: as in ``fastreft eval``. The rest is the harness's. Of a text of which all
    is scored (perplexity) the prompt is what stands before it, one token. :class:`UserError` where there is no ReFT adapter.
    """

    def __init__(self, pretrained: Any = None, peft: str | None = None, dtype: Any = "auto", **more: Any):
        if pretrained is None or isinstance(pretrained, str):
            if peft is None:
                raise UserError("the model reft is one with a ReFT adapter: give peft=FOLDER")
            named = pretrained or reft_config(peft).base_model_name_or_path
            if not named:
                raise UserError(f"the adapter in '{peft}' names no base model: give pretrained=FOLDER_OR_NAME")
            on_gpu = torch.cuda.is_available() and more.get("device") != "cpu"
            dtype = dtype_of(named, dtype, on_gpu=on_gpu) if isinstance(dtype, str) else dtype
            pretrained, _ = find_model(named)
        elif not any(isinstance(config, ReftSettings) for config in getattr(pretrained, "peft_config", {}).values()):
            raise UserError(f"the model reft is one with a ReFT adapter, and this {type(pretrained).__name__} has none")
        self._prompts: dict[tuple[int, ...], int] | None = None
        super().__init__(pretrained=pretrained, peft=peft, dtype=dtype, **more)

    def _loglikelihood_tokens(self, requests: Sequence[Request], **more: Any) -> list[tuple[float, bool]]:  # type: ignore[override]
        """The harness's, in rounds, in each of which the tokens of an input say where its prompt ends: one round, but for the
        same tokens as another prompt and answer, which are in the next."""
        if self.backend != "causal":  # the encoder's input is the prompt
            return super()._loglikelihood_tokens(requests, **more)
        lengths: dict[tuple[int, ...], list[int]] = {}
        rounds: list[list[int]] = []
        for i, (_, context, continuation) in enumerate(requests):
            row = (context + continuation)[-(self.max_length + 1) : -1]  # what the harness gives the model
            length = len(row) - len(continuation) + 1
            seen = lengths.setdefault(_shown(row), [])
            if length not in seen:
                seen.append(length)
            turn = seen.index(length)
            if turn == len(rounds):
                rounds.append([])
            rounds[turn].append(i)
        answers: list[Any] = [None] * len(requests)
        for turn, chosen in enumerate(rounds):
            self._prompts = {row: seen[turn] for row, seen in lengths.items() if turn < len(seen)}
            try:
                found = super()._loglikelihood_tokens([requests[i] for i in chosen], **more)
            finally:
                self._prompts = None
            for i, answer in zip(chosen, found, strict=True):
                answers[i] = answer
        return answers

    def _model_call(self, inps: torch.Tensor, attn_mask: Any = None, labels: Any = None) -> torch.Tensor:
        """The harness's, told how many tokens of each row (B, S) of ``inps`` are the prompt; they are padded on the right."""
        if self._prompts is None or labels is not None:
            return super()._model_call(inps, attn_mask, labels)
        lengths = [self._prompts[_shown(row)] for row in inps.tolist()]
        with (
            torch.no_grad(),
            torch.autocast(self.device.type, self.mixed_precision_dtype, self.mixed_precision_dtype is not None),
        ):
            return self.model(inps, reft_prompt_lengths=torch.tensor(lengths, device=inps.device)).logits

    def _detect_batch_size(self, *args: Any, **more: Any) -> int:
        known, self._prompts = self._prompts, None  # it tries rows of ones
        try:
            return super()._detect_batch_size(*args, **more)
        finally:
            self._prompts = known


def _shown(row: list[int]) -> tuple[int, ...]:
    """A row without its padding, which is zeros, and what else of it is zeros at its end."""
    end = len(row)
    while end and row[end - 1] == 0:
        end -= 1
    return tuple(row[:end])


if __name__ == "__main__":
    cli_evaluate()
