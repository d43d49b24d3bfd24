"""The checkpoints of a training: which of them are whole, so that a run goes on with the same bits."""

from __future__ import annotations

import glob
import json
import re
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

from .errors import UserError
from .places import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MODEL_CONFIG, MODEL_WEIGHTS
from .processes import is_first


def lacks(folder: Path, *, adapter: bool = True) -> str | None:
    """What a checkpoint lacks, in words; None for a whole one. Nothing of it is unpickled. ``adapter``: it is an adapter's, and
    not a whole model's."""
    configuration, weights = (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if adapter else (MODEL_CONFIG, MODEL_WEIGHTS)
    for name in ("trainer_state.json", configuration):  # the first is written last
        try:
            found = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return f"no {name} that can be read"
        if not isinstance(found, dict):
            return f"no {name} that can be read"
    try:
        with safe_open(folder / weights, framework="pt") as file:
            file.keys()
    except (OSError, SafetensorError):
        return f"no {weights} that can be read"
    states = sorted(folder.glob("rng_state*.pth")) or [folder / "rng_state.pth"]
    for path in (*_optimizer_files(folder), folder / "scheduler.pt", *states):
        try:
            with zipfile.ZipFile(path) as file:
                broken = file.testzip()
        except (OSError, zipfile.BadZipFile):
            broken = path.name
        if broken:
            return f"no {path.name} that can be read"
    return None


def _optimizer_files(folder: Path) -> list[Path]:
    """What a checkpoint keeps of its optimizer: Trainer a file, and so with FSDP; DeepSpeed a folder that "latest" names."""
    latest = folder / "latest"
    if latest.is_file():
        named = latest.read_text(encoding="utf-8", errors="replace").strip()
        return sorted(folder.glob(f"{glob.escape(named)}/*.pt")) or [latest]
    sharded = folder / "optimizer.bin"
    return [sharded if sharded.is_file() else folder / "optimizer.pt"]


def newest_whole(output_dir: str, *, adapter: bool = True) -> str:
    """The newest whole checkpoint of a run's folder; says which are passed over. :class:`UserError` where there is none."""
    named = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in Path(output_dir).glob("checkpoint-*"))
    found = [(int(match[1]), path) for match, path in named if match]
    passed: list[str] = []
    for _, folder in sorted(found, reverse=True):
        missing = lacks(folder, adapter=adapter)
        if missing is None:
            if passed and is_first():
                print(f"note: resuming from {folder.name}; not whole: {', '.join(passed)}")
            return str(folder)
        passed.append(f"{folder.name} ({missing})")
    whole, why = ("whole ", f": {', '.join(passed)}") if passed else ("", "")
    raise UserError(f"there is no {whole}checkpoint in '{output_dir}' to resume from{why}")
