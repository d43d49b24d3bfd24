"""pyreft's data set classes: records to tokens, labels and locations, with one padding token added to each text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import torch
from torch.utils.data import Dataset

from .data import IGNORE_INDEX, _tokens, get_intervention_locations, parse_positions, tokenize_pair

_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n%s\n\n### Input:\n%s\n\n### Response:\n"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n%s\n\n### Response:\n"
)


class ReftDataset(Dataset):
    """The base: a subclass says in :meth:`tokenize` what a record becomes.

    ``position`` is "fN+lM" and the like; ``num_interventions`` and ``share_weights`` as in :func:`get_intervention_locations`;
    other keywords are kept in ``fields``. Records come from ``dataset``, else a ``.json`` file at ``data_path``, else the
    hub's ``task``; a record's ``subspaces`` are the rows of R that it is edited with. A subclass may set ``pad_mode`` ("first"
    or "last": where the padding token goes) and ``fields_to_pad`` in :meth:`preprocess`.
    """

    pad_mode = "first"
    fields_to_pad: Sequence[str] = ("input_ids", "labels")

    def __init__(
        self,
        task: str,
        data_path: str | None,
        tokenizer: Any,
        data_split: str = "train",
        dataset: Any = None,
        seed: int = 42,
        max_n_example: int | None = None,
        *,
        position: str,
        num_interventions: int,
        share_weights: bool = False,
        **fields: Any,
    ):
        self.tokenizer, self.data_split = tokenizer, data_split
        self.first_n, self.last_n = parse_positions(position)
        self.fields = fields
        self.preprocess(fields)
        records = _load(task, data_path, data_split) if dataset is None else dataset
        if max_n_example is not None:
            records = records.shuffle(seed=seed).select(range(max_n_example))
        self.raw_dataset = records if data_split != "train" else None
        self.result = []
        for i, record in enumerate(records):
            item, last_position = self.tokenize(record)
            locations = get_intervention_locations(
                last_position=last_position,
                first_n=self.first_n,
                last_n=self.last_n,
                num_interventions=num_interventions,
                share_weights=share_weights,
                pad_mode=self.pad_mode,
            )
            made = {**self._padded(item), "intervention_locations": self._shifted(locations), "id": i}
            if "subspaces" in record:  # the same rows of every intervention
                made["subspaces"] = [list(record["subspaces"])] * num_interventions
            self.result.append(made)

    def _padded(self, item: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The item as tensors, with the padding token that locations without a token point to."""
        pad = self.tokenizer.pad_token_id
        for field in self.fields_to_pad:
            if field in item:
                fill = torch.tensor([IGNORE_INDEX if field == "labels" else pad])
                pieces = [fill, torch.as_tensor(item[field])]
                item[field] = torch.cat(pieces if self.pad_mode == "first" else pieces[::-1])
        item["attention_mask"] = (item["input_ids"] != pad).int()
        return item

    def _shifted(self, locations: list[list[int]]) -> list[list[int]]:
        return [[column + (self.pad_mode == "first") for column in row] for row in locations]

    def preprocess(self, fields: dict[str, Any]) -> None:
        """Read the keywords; called first."""

    def tokenize(self, data_item: Any) -> tuple[dict[str, Any], int]:
        """({"input_ids": [...], "labels": [...]}, the prompt's length as the locations count it) of a record."""
        raise NotImplementedError(f"{type(self).__name__} must define tokenize(data_item)")

    def __len__(self) -> int:
        return len(self.result)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {**self.result[i]}


def _load(task: str, data_path: str | None, split: str) -> Any:
    if data_path is not None and data_path.endswith(".json"):
        return datasets.load_dataset("json", data_files=data_path, split="train")
    return datasets.load_dataset(task, data_path, split=split)


class _PairDataset(ReftDataset):
    """A prompt and its completion; the locations count from one token before the prompt's end, as pyreft does."""

    no_stop = False
    off_by_one = 1

    def _pair(self, prompt: str, completion: str) -> tuple[dict[str, Any], int]:
        end = "" if self.no_stop else self.tokenizer.eos_token
        ids, labels, length = tokenize_pair(self.tokenizer, prompt, completion + end)
        return {"input_ids": ids, "labels": labels}, length - self.off_by_one


class ReftGenerationDataset(_PairDataset):
    """Records with a ``prompt_field`` and a ``completion_field``."""

    def tokenize(self, data_item: Any) -> tuple[dict[str, Any], int]:
        return self._pair(data_item[self.fields["prompt_field"]], data_item[self.fields["completion_field"]])


class ReftSupervisedDataset(_PairDataset):
    """Alpaca's records: ``instruction_field``, ``input_field``, ``output_field``; ``no_stop`` leaves EOS out."""

    def preprocess(self, fields: dict[str, Any]) -> None:
        self.no_stop = fields.get("no_stop", False)

    def tokenize(self, data_item: Any) -> tuple[dict[str, Any], int]:
        instruction, given = data_item[self.fields["instruction_field"]], data_item.get(self.fields["input_field"])
        prompt = _WITH_INPUT % (instruction, given) if given else _WITHOUT_INPUT % instruction
        return self._pair(prompt, data_item[self.fields["output_field"]])


class ReftRawDataset(_PairDataset):
    """Records with an "instruction" and an "output", taken as they are; beyond the train split the prompt alone."""

    off_by_one = 0

    def tokenize(self, data_item: Any) -> tuple[dict[str, Any], int]:
        if self.data_split == "train":
            return self._pair(data_item["instruction"], data_item["output"])
        ids = _tokens(self.tokenizer, data_item["instruction"])
        return {"input_ids": ids}, len(ids)


class ReftClassificationDataset(ReftDataset):
    """Records with one text, ``input_field``; a ``label_field`` is tokenized as text, and None leaves labels out."""

    def tokenize(self, data_item: Any) -> tuple[dict[str, Any], int]:
        ids = _tokens(self.tokenizer, data_item[self.fields["input_field"]])
        item = {"input_ids": ids}
        if self.fields.get("label_field") is not None:
            item["labels"] = _tokens(self.tokenizer, data_item[self.fields["label_field"]])
        return item, len(ids) - 1
