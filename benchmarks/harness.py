"""Timing for every benchmark: variants alternate, a figure is the median of its rounds, a claim is a ratio from one run."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch


def measure(
    variants: dict[str, Callable[[], object]],
    rounds: int = 30,
    warmup: int = 3,
    budget_s: float = 60.0,
    settle: int = 0,
) -> dict[str, float]:
    """Median milliseconds of each variant. The variants take turns, so that a busy moment hits all of them alike.

    A slow variant gets fewer rounds: each may use an equal share of ``budget_s``, but never fewer than 3. ``settle`` untimed
    calls come before each timed one, where a variant would else meet the heap as the one before it left it.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    for run in variants.values():
        for _ in range(warmup):
            start = time.perf_counter()
            run()
            if time.perf_counter() - start > budget_s / 20:
                break
    for _ in range(rounds):
        for name, run in variants.items():
            taken = times[name]
            if len(taken) >= 3 and sum(taken) > 1e3 * budget_s / len(variants):
                continue
            for _ in range(settle):
                run()
            _sync()
            start = time.perf_counter()
            run()
            _sync()
            taken.append(1e3 * (time.perf_counter() - start))
    return {name: median(taken) for name, taken in times.items()}


def keep_heap() -> bool:
    """From here on glibc keeps freed memory for the next result; False where it is not glibc.

    By default it hands the memory of a large result back, and the next one is made of fresh pages. What those cost is the
    system's affair: in a virtual machine whose host has taken them back, many times more than the edit itself.
    """
    mmap_threshold, trim_threshold = -3, -1
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(mmap_threshold, 1 << 30) and mallopt(trim_threshold, (1 << 31) - 1))


def _sync() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def table(title: str, rows: list[dict[str, object]]) -> None:
    """A plain table; the columns are those of the first row."""
    print(f"\n{title}")
    columns = list(rows[0])
    cells = [[_cell(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(len(column), *(len(line[i]) for line in cells)) for i, column in enumerate(columns)]
    for line in [columns, *cells]:
        print("  " + "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:#.4g}"
    return str(value)


def device_name() -> str:
    """The GPU's name, or the processor's, fit for a folder name."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        name = next((line.split(":")[1] for line in lines if line.startswith("model name")), platform.processor())
        name = f"cpu {name.strip()} x{os.cpu_count()}"
    return "-".join("".join(ch if ch.isalnum() else " " for ch in name).split()).lower()


def environment() -> dict[str, object]:
    """What a figure depends on."""
    return {
        "device": device_name(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }


def parser(description: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--rounds", type=int, default=30)
    made.add_argument("--save", action="store_true", help="write benchmarks/results/<device>/<script>.json")
    return made


def save(script: str, results: object) -> Path:
    """Results beside the machine they come from; where they went."""
    path = Path(__file__).parent / "results" / device_name() / f"{Path(script).stem}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment(), "results": results}, indent=1) + "\n")
    print(f"wrote {path.relative_to(Path(__file__).parent.parent)}")
    return path


def pyreft_module(d: int, r: int, dtype: torch.dtype) -> torch.nn.Module | None:
    """pyreft's own LoreftIntervention, or None where pyreft is not installed (pip install --no-deps pyreft pyvene)."""
    try:
        from pyreft.interventions import LoreftIntervention
    except ImportError:
        return None
    return LoreftIntervention(embed_dim=d, low_rank_dimension=r, dtype=dtype)
