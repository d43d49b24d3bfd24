"""Predicts, on paper and with no GPU, what benchmarks/gpu_bench.py would find on one. Nothing printed here was measured.

    python benchmarks/gpu_model.py [--gpu H100] [--json FILE]        needs nvcc, nvdisasm (pip install -e '.[sass]') and g++

The plan of each call comes from the launch policy, the instructions and a warp's time alone from the machine code, by
following two warps of a CTA through it with the launch's own arguments (tools/sass/). All that is believed of a GPU is in
Assumptions and GPUS: a first measurement corrects those, not the table.

A CTA's tile takes the longest of
    alone     the slowest warp's own code from barrier to barrier, and what the barriers themselves cost
    issue     the instructions of all warps of a multiprocessor over its four schedulers
    shared    bytes to and from shared memory, 128 a cycle
    memory    the tile's bytes at the copy rate, shared by the multiprocessors at work
and somewhat more where several are near it. A launch is its start, what comes before and behind the tiles, and the tiles
that one CTA goes through, in as many waves as its CTAs need.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from sass import calls, toolkit
from sass.calls import Call, Device, Launch
from sass.checks import per_sm, team_of
from sass.tiles import PIECES, Cost, costs
from sass.warp import Latency

LATENCIES = {
    # Cycles until a result is there, the operations on shared memory and tensor cores near arXiv:2402.13499 (H100), the
    # others assumed: doubling those of LDS, LDC and branches together moves a tile's time by some percent only.
    "LDS": 30, "LDSM": 34, "HMMA": 34, "SHFL": 26, "LDC": 36, "S2R": 40, "S2UR": 40, "R2UR": 12, "MUFU": 22, "I2F": 22,
    "F2I": 22, "F2F": 22, "STS": 24, "STSM": 24, "STG": 20, "ST": 24, "LDGSTS": 24, "STAS": 24, "POPC": 20, "FLO": 20,
    "DADD": 16, "DMUL": 16, "DFMA": 16, "DSETP": 16, "SYNCS": 24,
}  # fmt: skip


@dataclass(frozen=True)
class Assumptions:
    """Cycles unless a name says otherwise. Measured by this project where it says so, else assumed."""

    latencies: Mapping[str, float] = field(default_factory=lambda: dict(LATENCIES))
    near_load: float = 280  # a load that the L2 has: near arXiv:2402.13499 (263 on an H100)
    far_load: float = 479  # one from DRAM, alone on its way: arXiv:2402.13499
    fence: float = 750  # MEMBAR.ALL.GPU with stores on their way: assumed, 500 to 1000
    cluster_barrier: float = 250  # barrier.cluster besides its fence: assumed
    exchange: float = 453  # st.async to another CTA, seen by its mbarrier: measured on an H200 (gpu_micro.cu)
    exchange_hidden: float = 0.0  # the part of it that other work of the CTA covers: 1 where tiles overlap entirely
    sharpness: float = 3.0  # how bounds that are near each other add up: a p-norm, infinity being the plain maximum
    launch_us: float = 1.3  # a kernel in a replayed graph, after another one: assumed
    drain_us: float = 0.5  # from the last store of the last kernel to its end: assumed
    shared_bytes: float = 128  # a cycle and multiprocessor: NVIDIA's documentation
    schedulers: int = 4  # of a multiprocessor, an instruction a cycle each: NVIDIA's documentation


@dataclass(frozen=True)
class Gpu:
    device: Device
    clock: float  # GHz
    copy: float  # TB/s, reads and writes together
    arch: int = 90  # whose code is looked at
    note: str = ""


SHARED = 232448
HOPPER = {(1, 8): 15, (2, 8): 30, (1, 4): 31, (2, 4): 62}  # public reports: a GPC has fewer than 16 multiprocessors
GPUS = {
    # Clocks: the boost clocks, assumed to hold. Copy rates: assumed. The H200's are measured: benchmarks/results/nvidia-h200,
    # and the clock that its profiler found under these kernels (1.7 to 1.8 GHz).
    "H100": Gpu(Device(9, 0, 132, SHARED, 16, HOPPER), 1.98, 3.0, note="SXM"),
    "H200": Gpu(Device(9, 0, 132, SHARED, 16, HOPPER), 1.75, 4.2, note="clock and copy rate measured"),
    "A100": Gpu(Device(8, 0, 108, 166912, 1), 1.41, 1.7, 80, "no clusters: the matrices are streamed"),
    "B200": Gpu(
        Device(10, 0, 148, SHARED, 16, {(1, 8): 17, (2, 8): 34, (1, 4): 35, (2, 4): 70}),
        1.965, 6.5, 100, "the latencies of cc 9.0; clusters at once assumed",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Work:
    name: str
    r: int
    calls: tuple[Call, ...]
    bytes: float  # that have to be moved


def works() -> list[Work]:
    n, d = 32768, 4096
    ranks = (4, 8, 16, 32, 64)
    found = [Work("forward", r, (Call("forward", n, d, r),), 4 * n * d) for r in ranks]
    found += [Work("backward", r, (Call("backward", n, d, r),), 6 * n * d) for r in ranks]
    for r in (4, 8):
        edit = {"n": 160, "d": d, "r": r, "total": 4096, "listed": True}
        found.append(Work("160 rows, forward", r, (Call("forward", **edit),), 4 * 160 * d))
        both = (Call("forward", **edit, kept=True), Call("backward", **edit, dh=False))
        found.append(Work("160 rows, forward + backward", r, both, 10 * 160 * d))
    found.append(Work("optimizer, 64 x (R, W, b)", 8, (Call("step", 64, d, 8),), 2 * 64 * 8 * d * 28))
    return found


@dataclass(frozen=True)
class Looked:
    """One launch with what its code costs."""

    launch: Launch
    tile: Cost
    rest: Cost
    registers: int
    per_sm: int  # CTAs that a multiprocessor has room for


def looked_at(launch: Launch) -> dict[int, int]:
    """As team_of; of a CTA whose warps do the same, the first and one that is taken to be like all others."""
    team = team_of(launch)
    if len(team) > 1 or launch.tiles.pieces >= PIECES:
        return team
    return {0: 1, 7: team[0] - 1}


def look(
    program: Path, folder: Path, gpu: Gpu, kernel: str, asked: list[tuple[Call, int]], a: Assumptions
) -> list[Looked | str]:
    """The launches of one kernel, compiled once; why not, where its way through the code cannot be followed."""
    found: list[Looked | str] = []
    code = None
    for call, which in asked:
        launch = calls.launches(program, call, gpu.device)[which]
        code = code or toolkit.compiled(kernel, folder, gpu.arch)
        load = a.far_load if call.what == "step" else a.near_load
        latency = Latency({**a.latencies, "LDG": load, "LD": a.near_load})
        try:
            cost = costs(program, call, gpu.device, which, code, latency, tuple(looked_at(launch)))
        except RuntimeError as error:
            found.append(f"{kernel} cannot be followed: {str(error).split(': ', 1)[-1]}")
            continue
        found.append(Looked(launch, cost.tile, cost.rest, code.registers, per_sm(code, launch, gpu.device)))
    return found


def look_at_all(
    gpus: Mapping[str, Gpu], a: Assumptions, folder: Path, jobs: int
) -> dict[tuple[str, Call, int], Looked | str]:
    """Everything that the GPUs' works launch. Two GPUs with one device and one code are looked at once."""
    program = calls.build(folder)
    found: dict[tuple[str, Call, int], Looked | str] = {}
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        running = []
        done: dict[tuple[Device, int], str] = {}
        for name, gpu in gpus.items():
            if (gpu.device, gpu.arch) in done:
                continue
            done[gpu.device, gpu.arch] = name
            by_kernel: dict[str, list[tuple[Call, int]]] = {}
            for call in dict.fromkeys(call for work in works() for call in work.calls):
                for which, launch in enumerate(calls.launches(program, call, gpu.device)):
                    by_kernel.setdefault(launch.kernel, []).append((call, which))
            for kernel, asked in by_kernel.items():
                own = folder / name
                own.mkdir(exist_ok=True)
                running.append((name, asked, pool.submit(look, program, own, gpu, kernel, asked, a)))
        for name, asked, job in running:
            found |= {(name, *one): looked for one, looked in zip(asked, job.result(), strict=True)}
    for name, gpu in gpus.items():
        same = done[gpu.device, gpu.arch]
        found |= {(name, *key[1:]): looked for key, looked in list(found.items()) if key[0] == same}
    return found


# ---- the model --------------------------------------------------------------------------------------------------------


def matching(counts: Counter[str], *marks: str) -> float:
    return sum(count for op, count in counts.items() if any(mark in op for mark in marks))


def waits(cost: Cost, a: Assumptions) -> float:
    """Cycles that a CTA waits for others and for the memory's order, not in its warps' own time."""
    fences = matching(cost.counts, "MEMBAR") - matching(cost.counts, ".CTA")
    exchanges = matching(cost.counts, "TRYWAIT")
    barriers = matching(cost.counts, "UCGABAR_WAIT")
    return fences * a.fence + barriers * a.cluster_barrier + exchanges * a.exchange * (1 - a.exchange_hidden)


def alone(cost: Cost, launch: Launch, a: Assumptions, overlap: bool) -> float:
    """Cycles of a CTA's own way, with nobody else on its multiprocessor.

    Where coordinates are worked out by warps of their own, sums go to them and coordinates come back while the other warps are
    at work on the tiles before and behind (`overlap`), or those wait for them.
    """
    if launch.tiles.sets == 0:
        return cost.critical + waits(cost, a)
    worker, _, owner = cost.cycles
    fences = waits(cost, a) - matching(cost.counts, "TRYWAIT") * a.exchange * (1 - a.exchange_hidden)
    there_and_back = 2 * a.exchange * (1 - a.exchange_hidden)
    if overlap and launch.tiles.sets > 1:
        return max(worker, owner + there_and_back) + fences
    return worker - cost.aside + max(cost.aside, cost.behind[2] + there_and_back) + fences


def shared_bytes(cost: Cost) -> float:
    """To and from shared memory by a warp."""
    total = 0.0
    for op, count in cost.counts.items():
        base = op.split(".")[0]
        if base in ("LDS", "STS", "STAS"):
            total += count * 128 * (4 if ".128" in op else 2 if ".64" in op else 1)
        elif base in ("LDSM", "STSM"):
            total += count * 128 * int(op[-1])
        elif base == "LDGSTS":
            total += count * 512
    return total


def together(bounds: Mapping[str, float], sharpness: float) -> float:
    most = max(bounds.values())
    return most * sum((bound / most) ** sharpness for bound in bounds.values()) ** (1 / sharpness) if most else 0.0


@dataclass(frozen=True)
class Predicted:
    """One launch."""

    kernel: str
    plan: str
    us: float
    bound_by: str
    instructions: float  # a tile and warp
    alone: float  # cycles of a tile
    round: float  # of a tile, with all that shares the multiprocessor
    bounds: dict[str, float]


def predicted(looked: Looked, gpu: Gpu, a: Assumptions, moved: float) -> Predicted:
    """`moved`: bytes of a launch without tiles."""
    launch, sms = looked.launch, gpu.device.multiprocessors
    ctas = launch.grid[0] * launch.grid[1] * launch.grid[2]
    at_once = max(1, min(looked.per_sm, -(-ctas // sms)))  # CTAs of a multiprocessor
    working = min(sms, -(-ctas // at_once))
    rate = 1e3 * gpu.copy / gpu.clock / working  # bytes a cycle and multiprocessor
    warps = launch.threads / 32

    def bounds(cost: Cost, bytes_moved: float, overlap: bool) -> dict[str, float]:
        team = looked_at(launch)
        issued = sum(n * of_one for n, of_one in zip(team.values(), cost.instructions, strict=True))
        sharing = team[0] if launch.tiles.sets > 0 else warps
        return {
            "alone": alone(cost, launch, a, overlap),
            "issue": at_once * issued / a.schedulers,
            "shared": at_once * sharing * shared_bytes(cost) / a.shared_bytes,
            "memory": at_once * bytes_moved / rate,
        }

    tiled = launch.tiles.count > launch.tiles.groups
    of_tile = bounds(looked.tile, launch.tiles.bytes if tiled else 0, True)
    of_rest = bounds(looked.rest, 0 if tiled else launch.tiles.bytes if launch.tiles.count else moved / ctas, False)
    one, rest = together(of_tile, a.sharpness), together(of_rest, a.sharpness)
    each = -(-launch.tiles.count // launch.tiles.groups) if tiled else 0
    waves = ctas / (looked.per_sm * sms)
    waves = max(1, -(-waves // 1) if tiled else waves)  # CTAs without tiles differ: what ends early makes room
    us = a.launch_us + waves * (rest + each * one) / gpu.clock / 1e3
    main = of_tile if each * one > rest else of_rest
    plan = f"{looked.registers} registers, {ctas} CTAs, {at_once} an SM"
    if launch.cluster > 1:
        plan += f", clusters of {launch.cluster}"
    if launch.tiles.count:
        plan += f", {max(each, 1)} tiles of {launch.tiles.rows}"
    return Predicted(
        launch.kernel,
        plan,
        us,
        max(main, key=lambda name: main[name]),
        looked.tile.instructions[0] if tiled else looked.rest.instructions[0],
        main["alone"],
        one if tiled else rest,
        main,
    )


def line_of(
    name: str, gpu: Gpu, work: Work, looked: dict[tuple[str, Call, int], Looked | str], a: Assumptions
) -> dict[str, object]:
    parts = []
    for call in work.calls:
        launched = sorted((key for key in looked if key[:2] == (name, call)), key=lambda key: key[2])
        # An optimizer's launches share its bytes; sums of partial sums come from the L2.
        moved = work.bytes / len(launched) if call.what == "step" else 0.0
        for key in launched:
            one = looked[key]
            if isinstance(one, str):
                return {"gpu": name, "what": work.name, "r": work.r, "why not": one}
            parts.append(predicted(one, gpu, a, moved))
    floor = work.bytes / gpu.copy / 1e6
    us = max(sum(part.us for part in parts) + a.drain_us, floor)
    return {"gpu": name, "what": work.name, "r": work.r, "us": us, "% of copy": 100 * floor / us, "launches": parts}


def markdown(lines: list[dict], gpus: Mapping[str, Gpu]) -> str:
    out = []
    for name in dict.fromkeys(line["gpu"] for line in lines):
        gpu = gpus[name]
        note = f" ({gpu.note})" if gpu.note else ""
        out += [
            f"\n### {name}{note}: predicted, not measured\n",
            f"{gpu.device.multiprocessors} SMs at {gpu.clock} GHz, a copy of {gpu.copy} TB/s.\n",
            "| what | r | predicted us | predicted % of copy | launch | plan | instructions of a warp | cycles of a tile "
            "(alone / issue / shared / memory) | bound by |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for line in (line for line in lines if line["gpu"] == name):
            if "why not" in line:
                out.append(f"| {line['what']} | {line['r']} | not predicted | | {line['why not']} | | | | |")
                continue
            for i, part in enumerate(line["launches"]):
                share = f"{line['% of copy']:.0f}" if "rows" not in line["what"] else ""
                head = f"| {line['what']} | {line['r']} | **{line['us']:.1f}** | {share} " if i == 0 else "| | | | "
                b = part.bounds
                cycles = (
                    f"{part.round:.0f} ({b['alone']:.0f} / {b['issue']:.0f} / {b['shared']:.0f} / {b['memory']:.0f})"
                )
                out.append(
                    f"{head}| {part.kernel}: {part.us:.1f} us | {part.plan} | {part.instructions:.0f} | {cycles} "
                    f"| {part.bound_by} |"
                )
    return "\n".join(out)


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument(
        "--gpu",
        choices=GPUS,
        action="append",
        help="one of them; all by default",
    )
    asked.add_argument("--json", type=Path, help="write the figures and the assumptions there")
    asked.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1))
    options = asked.parse_args()
    if lacking := toolkit.missing():
        sys.exit(lacking)
    gpus = {name: GPUS[name] for name in options.gpu or GPUS}
    a = Assumptions()
    with tempfile.TemporaryDirectory() as folder:
        looked = look_at_all(gpus, a, Path(folder), options.jobs)
    lines = [line_of(name, gpu, work, looked, a) for name, gpu in gpus.items() for work in works()]
    print(markdown(lines, gpus))
    if options.json:
        assumed = {"assumptions": asdict(a)}
        assumed["gpus"] = {name: {"clock": g.clock, "copy": g.copy, "note": g.note} for name, g in gpus.items()}
        made = [
            line if "why not" in line else line | {"launches": [asdict(part) for part in line["launches"]]}
            for line in lines
        ]
        options.json.write_text(json.dumps(assumed | {"predicted, not measured": made}, indent=1) + "\n")


if __name__ == "__main__":
    main()
