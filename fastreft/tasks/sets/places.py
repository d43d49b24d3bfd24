"""Where a task's records are: a folder on this machine, or a hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError, user_errors


def file_of(folder: Path, *names: str) -> Path:
    """The first file of these names that there is in a folder; :class:`UserError` where there is none."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"the data folder '{folder}' has none of {', '.join(names)}")


# Of a data set that is a script, which ``datasets`` no longer runs: the branch where the hub keeps its records.
CONVERTED = "refs/convert/parquet"


def from_hub(
    name: str, config: str | None, split: str, revision: str | None = None, file: str | None = None
) -> Iterator[dict[str, Any]]:
    """The records of a data set on a hub, as they are there; ``file``: of a JSON file in it."""
    from datasets import load_dataset

    where = f"'{name}'" + (f" ({config})" if config else "")
    with user_errors(
        Exception, prefix=f"cannot load the data set {where} from the hub; give --data_dir for a folder: "
    ):
        if file is not None:
            yield from load_dataset("json", data_files=f"hf://datasets/{name}/{file}", split="train")
        else:
            yield from load_dataset(name, config, split=split, revision=revision)
