"""How long nvcc takes for the CUDA kernels, for one architecture: wall and CPU seconds, and the slowest unit.

    python benchmarks/bench_build.py [--against CHECKOUT] [--jobs 2] [--arch 90] [--rounds 1] [--save]

``--against`` alternates with another checkout. ``--jobs`` units compile at a time, the largest first. Nothing is linked.
"""

from __future__ import annotations

import resource
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from time import perf_counter

from harness import parser, save

HERE = Path(__file__).resolve().parent.parent


def compile_all(checkout: Path, arch: str, jobs: int) -> dict[str, float]:
    """Seconds of all units of a checkout, and of the slowest by the clock of its own."""
    units = sorted((checkout / "csrc").rglob("*.cu"), key=lambda unit: -unit.stat().st_size)
    flags = ["-std=c++17", "-O3", "-lineinfo", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-Xcompiler", "-fPIC"]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:

        def one(unit: Path) -> float:
            start = perf_counter()
            subprocess.run(["nvcc", *flags, "-c", str(unit), "-o", f"{folder}/{unit.stem}.o"], check=True)
            return perf_counter() - start

        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), perf_counter()
        times = list(pool.map(one, units))
        wall, after = perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"units": len(units), "wall_s": wall, "cpu_s": cpu, "slowest_unit_s": max(times)}


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--against", type=Path)
    flags.add_argument("--arch", default="90")
    flags.add_argument("--jobs", type=int, default=2)
    flags.set_defaults(rounds=1)
    options = flags.parse_args()
    checkouts = {"here": HERE} | ({"against": options.against.resolve()} if options.against else {})
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in checkouts}
    for _ in range(options.rounds):
        for name, checkout in checkouts.items():
            runs[name].append(compile_all(checkout, options.arch, options.jobs))
    results = {name: {key: median(run[key] for run in each) for key in each[0]} for name, each in runs.items()}
    for name, found in results.items():
        print(name, "  ".join(f"{key} {value:.1f}" for key, value in found.items()))
    if options.save:
        save(__file__, {"arch": options.arch, "jobs": options.jobs, **results})


if __name__ == "__main__":
    main()
