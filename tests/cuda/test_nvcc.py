"""Where nvcc is: every kernel compiles for every arch, without spills, stack frames or too much shared memory.

Two arches as a rule: one with clusters and bulk copies to machine code, which is looked at, of bf16's tensor-core kernels and
not of f16's, and one before them as far as PTX; everything to machine code, for eight times the minutes, with
FASTREFT_ARCHES=all (`make arches`). Registers and shared memory
of each kernel are printed (``pytest -s``). Nothing runs here: no GPU is asked for.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sass.toolkit import nvcc, usage

CSRC = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
ALL = os.environ.get("FASTREFT_ARCHES") == "all"
ARCHES = (80, 90, 100, 120) if ALL else (80, 90)
STATIC_SHARED = 48 * 1024  # what a kernel may hold without asking; ours ask for dynamic memory, see test_policy.py
REGISTERS = 255


def known_arches() -> list[int]:
    if nvcc() is None:
        return []
    listed = subprocess.run([nvcc(), "--list-gpu-arch"], capture_output=True, text=True).stdout
    return [arch for arch in ARCHES if f"compute_{arch}\n" in listed]


def faults(found: dict[str, int]) -> list[str]:
    """What is wrong with one kernel; a report that misses a number is wrong too."""
    limits = {"stack": 0, "stores": 0, "loads": 0, "registers": REGISTERS, "shared": STATIC_SHARED}
    return [f"{key} {found.get(key)}" for key, limit in limits.items() if found.get(key, limit + 1) > limit]


def test_the_report_is_read_and_faults_are_found():
    report = """
ptxas info    : Compiling entry function 'good' for 'sm_80'
ptxas info    : Function properties for good
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 1024 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function 'bad' for 'sm_90'
    8 bytes stack frame, 4 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, 65536 bytes smem
"""
    found = usage(report)
    assert found["good", "sm_80"] == {"stack": 0, "stores": 0, "loads": 0, "registers": 40, "shared": 1024}
    assert faults(found["good", "sm_80"]) == []
    assert faults(found["bad", "sm_90"]) == ["stack 8", "stores 4", "shared 65536"]
    assert faults({}) != []


@pytest.mark.skipif(nvcc() is None, reason="no nvcc here")
def test_every_kernel_on_every_arch(tmp_path):
    arches = known_arches()
    assert arches, "this nvcc knows none of the arches"
    jobs = [(unit, arch) for unit in sorted(CSRC.glob("*.cu")) for arch in arches]
    assert jobs

    def compile_one(job: tuple[Path, int]) -> str:
        unit, arch = job
        command = [nvcc(), "-std=c++17", "-O3", f"-arch=sm_{arch}", "-Xptxas", "-v"]
        if ALL:
            command += ["-cubin"]
        elif arch == 90:
            command += ["-cubin", "-DFASTREFT_BF16_ALONE"]
        else:  # what nobody looks at, in a third of the time
            command += ["-ptx", "-Xcicc", "-O0"]
        command += [str(unit), "-o", str(tmp_path / f"{unit.stem}.{arch}")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-4000:]}"
        return done.stderr + done.stdout

    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        reports = list(pool.map(compile_one, jobs))
    found: dict[tuple[str, str], dict[str, int]] = {}
    for report in reports:
        found |= usage(report)
    assert {arch for _, arch in found} == {f"sm_{arch}" for arch in arches if ALL or arch == 90}
    names = sorted({name for name, _ in found})
    plain = subprocess.run(["c++filt", "-p", *names], capture_output=True, text=True).stdout.split("\n")
    plain = dict(zip(names, plain, strict=False)) if shutil.which("c++filt") else {name: name for name in names}
    wrong = []
    for (name, arch), numbers in sorted(found.items()):
        print(f"{arch:7} {numbers.get('registers', -1):4} registers {numbers.get('shared', -1):6} B  {plain[name]}")
        wrong += [f"{arch} {plain[name]}: {fault}" for fault in faults(numbers)]
    assert not wrong, "\n".join(wrong)
