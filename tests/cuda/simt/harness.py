"""Builds the simulated device (``cuda_host.h``) around the project's .cu files and runs cases on it.

A case is a list of tensors, fields and calls; each runs in its own process, so that what a sanitizer says ends that case only.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[2] / "csrc"
TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
FLAGS = [
    *("-std=c++17", "-Og", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-DFASTREFT_SIMT"),
    "-MMD",  # beside every object, a file .d of what it was made of
]

H200 = (
    9,
    0,
    16,
    232448,
    8,
)  # its shared memory and clusters, fewer multiprocessors: small cases still take several tiles
A100 = (8, 0, 4, 166912, 1)


def compiler() -> str | None:
    """A g++ that knows 16-bit floats, or None."""
    return shutil.which("g++") if platform.system() == "Linux" else None


def made_of(listing: Path) -> set[str]:
    """The files of csrc/cuda that a unit is made of, from what ``-MMD`` wrote."""
    files = (Path(word) for word in listing.read_text().replace("\\\n", " ").split())
    return {file.name for file in files if file.parent.name == "cuda"}


def build(folder: Path, *, patches: dict[str, tuple[str, str]] | None = None, reuse: Path | None = None) -> Path:
    """Compiles the runner into ``folder``.

    ``patches`` (file of csrc/cuda -> text, other text) makes a faulty copy of the kernels. ``reuse`` is a folder of an
    earlier build of the kernels as they are: only the units that a patched file is part of are compiled anew then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source = CSRC
    if patches:
        source = folder / "csrc"
        shutil.copytree(CSRC, source)
        for name, (old, new) in patches.items():
            text = (source / "cuda" / name).read_text()
            assert text.count(old) == 1, f"{name}: {old!r} is there {text.count(old)} times"
            (source / "cuda" / name).write_text(text.replace(old, new))
    flags = [*FLAGS, f"-I{HERE}", f"-I{source}"]
    units = [*sorted((source / "cuda").glob("*.cu")), *sorted(HERE.glob("*.cpp"))]
    assert len({unit.stem for unit in units}) == len(units), "two units would make one object"
    ready = []
    if reuse:
        kept = [unit for unit in units if not made_of(reuse / f"{unit.stem}.d") & set(patches or {})]
        assert len(kept) < len(units), f"no unit is made of {patches}"
        ready = [str(reuse / f"{unit.stem}.o") for unit in kept]
        units = [unit for unit in units if unit not in kept]

    def compile_one(unit: Path) -> str:
        target = folder / f"{unit.stem}.o"
        command = [compiler(), *flags, "-x", "c++", "-c", str(unit), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")
        return str(target)

    with ThreadPoolExecutor(min(len(units), os.cpu_count() or 1)) as pool:
        objects = list(pool.map(compile_one, units))
    runner = folder / "runner"
    subprocess.run([compiler(), *flags, *objects, *ready, "-o", str(runner)], check=True)
    return runner


class Case:
    """One process of the runner: blocks of memory by name, fields of the next call, calls."""

    def __init__(self, runner: Path, folder: Path, *, device=H200, seed: int = 1, plant: str = ""):
        self.runner, self.folder = runner, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.lines = ["device " + " ".join(map(str, device)), f"seed {seed}"]
        if plant:
            self.lines.append(f"plant {plant}")
        self.tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        self.wanted: list[str] = []

    def load(self, name: str, tensor: torch.Tensor, *, skew: int = 0) -> str:
        """A block that holds ``tensor``; ``skew`` bytes past a 16-byte boundary."""
        tensor = tensor.detach().contiguous()
        path = self.folder / f"{name}.bin"
        path.write_bytes(bytes(tensor.reshape(-1).view(torch.uint8).numpy()))
        self.tensors[name] = (tensor.dtype, tuple(tensor.shape))
        self.lines.append(f"load {name} {path} {skew}")
        return name

    def make(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> str:
        """A block to be written by the kernels."""
        self.tensors[name] = (dtype, tuple(shape))
        self.lines.append(f"make {name} {torch.empty(shape, dtype=dtype).nbytes}")
        return name

    def set(self, **fields) -> None:
        self.lines += [f"set {key.replace('__', '.')} {value}" for key, value in fields.items() if value is not None]

    def call(self, word: str) -> None:
        self.lines.append(word)

    def want(self, *names: str) -> None:
        for name in names:
            self.lines.append(f"save {name} {self.folder / name}.out")
            self.wanted.append(name)

    def run(self, timeout: float = 120) -> dict[str, torch.Tensor]:
        """The wanted tensors after all calls; ``RuntimeError`` with the report where the run fails."""
        done = subprocess.run(
            [str(self.runner)], input="\n".join(self.lines) + "\n", capture_output=True, text=True, timeout=timeout
        )
        if done.returncode:
            raise RuntimeError(f"exit {done.returncode}: {done.stderr[:3000]}")
        out = {}
        for name in self.wanted:
            dtype, shape = self.tensors[name]
            raw = bytearray((self.folder / f"{name}.out").read_bytes())
            out[name] = (
                torch.frombuffer(raw, dtype=dtype).reshape(shape).clone() if raw else torch.empty(shape, dtype=dtype)
            )
        return out
