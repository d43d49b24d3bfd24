"""Which kernels a call launches on a device, and with which arguments: csrc/cuda's host code is built and asked (calls.cpp)."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from .toolkit import CUDA, ROOT

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Device:
    """What the launch policy is told of a device. `resident`: clusters of c CTAs that run at once, by (CTAs an SM, c)."""

    major: int
    minor: int
    multiprocessors: int
    shared: int  # bytes a CTA may ask for
    largest_cluster: int
    resident: dict[tuple[int, int], int] = field(default_factory=dict, hash=False)

    def words(self) -> list[int]:
        at_once = [
            self.resident.get((per_sm, c), self.multiprocessors * per_sm // c)
            for per_sm in (1, 2)
            for c in range(1, 17)
        ]
        return [self.major, self.minor, self.multiprocessors, self.shared, self.largest_cluster, *at_once]


@dataclass(frozen=True)
class Call:
    """An edit of n of `total` rows of d, or its backward, or with a pool, or a step of n interventions of r x d; LoReFT, fp32
    masters."""

    what: str  # forward, backward, pooled or step
    n: int
    d: int
    r: int
    total: int = 0  # 0: n
    listed: bool = False  # rows from a list, in place
    kept: bool = False  # a forward that will be differentiated
    dh: bool = True  # a backward whose gradient goes on to the hidden state


@dataclass(frozen=True)
class Tiles:
    """What a launch goes through tile by tile; all 0 where it does not."""

    rows: int = 0  # of a tile
    bytes: int = 0  # that a tile moves between global memory and one CTA
    count: int = 0
    groups: int = 0  # clusters, or CTAs, that share them
    pieces: int = 1  # of a tile, one after the other
    sets: int = 0  # tiles whose sums and coordinates may be on their way at once, which warps of their own add up


@dataclass(frozen=True)
class Launch:
    kernel: str  # fused_kernel<bf16, 8, false>
    grid: tuple[int, int, int]
    threads: int
    cluster: int
    shared: int
    tiles: Tiles
    bytes: bytes = field(repr=False)  # of the arguments, as the kernel finds them
    index: int = 0  # where the list of rows lies; 0: there is none
    adapter: int = 0  # the same of the rows' adapters
    table: int = 0  # and of their table, each line of which is of rank
    r: int = 0
    reserved: int = 0  # bytes of shared memory that are the system's, before the CTA's own


def build(folder: Path) -> Path:
    """The program that answers, built in `folder`."""
    units = [path for path in sorted(CUDA.glob("*.cu")) if path.name != "launch.cu"]  # which asks a real device
    source = (HERE / "calls.cpp").read_text()
    source = source.replace("FASTREFT_UNITS", "\n".join(f'#include "{path}"' for path in units), 1)
    unit, program = folder / "calls.cpp", folder / "calls"
    unit.write_text(source)
    # Of the kernels only the names are wanted: what they call of the simulator is never reached.
    command = ["g++", "-std=c++17", "-O0", "-w", "-DFASTREFT_SIMT", f"-I{CUDA}", f"-I{ROOT}/tests/cuda/simt"]
    command += ["-static", "-Wl,--unresolved-symbols=ignore-all", str(unit), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")
    return program


LAUNCH = re.compile(r"\[with auto Kernel = (.*?); First = .*?\] \| ([-\d ]+) \| ([-\d ]+) \| ([0-9a-f]+)$")


def launches(program: Path, call: Call, device: Device) -> list[Launch]:
    """What a call launches, in order."""
    numbers = [*device.words(), call.n, call.total or call.n, call.d, call.r, call.listed, call.kept, call.dh]
    done = subprocess.run([program, call.what, *(str(int(x)) for x in numbers)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{call} on {device}: error {done.returncode} {done.stderr}")
    first, *lines = done.stdout.splitlines()
    found = []
    for line in lines:
        match = LAUNCH.search(line)
        if match is None:
            raise ValueError(f"not a launch: {line[:400]}")
        kernel = match[1].replace("{anonymous}::", "").replace("fastreft::", "")
        x, y, z, threads, cluster, shared = (int(word) for word in match[2].split())
        found.append(
            Launch(
                kernel,
                (x, y, z),
                threads,
                cluster,
                shared,
                Tiles(*(int(word) for word in match[3].split())),
                bytes.fromhex(match[4]),
                *(int(word) for word in first.split()[1:]),
                call.r,
                1024 if device.major >= 9 else 0,
            )
        )
    return found
