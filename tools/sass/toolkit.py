"""Where nvcc and nvdisasm are, and one kernel compiled by the one and read by the other."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sysconfig
from pathlib import Path

from . import code

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "csrc" / "cuda"


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc") or (shutil.which("nvcc", path=f"{home}/bin") if home else None)


def nvdisasm() -> str | None:
    """On the path, beside nvcc, or from the package nvidia-cuda-nvdisasm (the extra `sass`)."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    wheels = Path(sysconfig.get_paths()["purelib"]).glob("nvidia/*/bin")
    folders = [f"{home}/bin" for home in homes if home] + [str(folder) for folder in sorted(wheels)]
    return shutil.which("nvdisasm") or shutil.which("nvdisasm", path=os.pathsep.join(folders))


def missing() -> str | None:
    """What this machine lacks for looking at machine code, in a sentence; None where nothing is."""
    lacks = [
        name for name, found in (("nvcc", nvcc()), ("nvdisasm", nvdisasm()), ("g++", shutil.which("g++"))) if not found
    ]
    if not lacks:
        return None
    hint = " (pip install nvidia-cuda-nvdisasm)" if "nvdisasm" in lacks else ""
    return f"Looking at machine code needs {' and '.join(lacks)}, not to be found here{hint}."


def declared(kernel: str) -> tuple[Path, str]:
    """The file that holds a kernel, and its parameters as they stand there; kernel: its name alone."""
    parameters = re.compile(rf"\b{kernel}\((const [^)]*)\) \{{")
    found = [(path, match[1]) for path in sorted(CUDA.glob("*.cu*")) if (match := parameters.search(path.read_text()))]
    if len(found) != 1:
        raise ValueError(f"kernel {kernel} should be in one file of {CUDA}, got {[path.name for path, _ in found]}")
    return found[0]


def compiled(kernel: str, folder: Path, arch: int = 90) -> code.Kernel:
    """One instance of a kernel, such as fused_kernel<bf16, 8, false>.

    A header's kernel is instantiated alone. A kernel in a unit of its own comes with whatever else is in the unit.
    """
    home, parameters = declared(kernel.split("<")[0])
    source = [f'#include "{home}"']
    if home.suffix == ".cuh":
        source += ["namespace fastreft {", f"template __global__ void {kernel}({parameters});", "}"]
    stem = re.sub(r"\W+", "_", f"{kernel}{arch}")
    unit, cubin = folder / f"{stem}.cu", folder / f"{stem}.cubin"
    unit.write_text("\n".join(source) + "\n")
    options = f"-std=c++17 -O3 -arch=sm_{arch} -lineinfo -Xptxas -v -cubin"
    command = [str(nvcc()), *options.split(), "-o", str(cubin), str(unit)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")
    kernels = disassembled(cubin)
    used = usage(done.stderr + done.stdout)
    for each in kernels:
        each.registers = used[each.name, f"sm_{arch}"]["registers"]
    names = plain_names([k.name for k in kernels])
    found = [k for k, name in zip(kernels, names, strict=True) if name == kernel]
    if len(found) != 1:
        raise ValueError(f"expected {kernel} once in {cubin}, got {names}")
    return found[0]


def plain_names(symbols: list[str]) -> list[str]:
    """Kernels as the source calls them: namespaces, the result and the arguments left out."""
    done = subprocess.run(["c++filt", *symbols], capture_output=True, text=True, check=True)
    found = []
    for line in done.stdout.splitlines():
        line = re.sub(r"\(anonymous namespace\)::|fastreft::|^void |\((?:bool|int)\)", "", line)
        found.append(line[: line.rindex("(")])
    return found


def disassembled(cubin: Path) -> list[code.Kernel]:
    done = subprocess.run([str(nvdisasm()), "-c", "-hex", "-gi", cubin], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"nvdisasm {cubin}: {done.stderr[-2000:]}")
    kernels = code.parse(done.stdout)
    sections = elf_sections(cubin.read_bytes())
    for kernel in kernels:
        kernel.constants = sections.get(f".nv.constant2.{kernel.name}", b"")
        kernel.parameters = parameters_of(sections[f".nv.info.{kernel.name}"])
    return kernels


def parameters_of(info: bytes) -> int:
    """Where in bank 0 a kernel's arguments begin: it is written in its attributes, of which each has a form and a name."""
    at = 0
    while at + 4 <= len(info):
        form, name, size = struct.unpack_from("<BBH", info, at)
        if (form, name) == (4, 0x0A):  # its symbol, then the place and the size
            return struct.unpack_from("<IHH", info, at + 4)[1]
        at += 4 + (size if form == 4 else 0)
    raise ValueError("a kernel's attributes do not say where its arguments are")


def elf_sections(image: bytes) -> dict[str, bytes]:
    table = struct.unpack_from("<Q", image, 0x28)[0]
    entry, count, names = struct.unpack_from("<HHH", image, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", image, table + i * entry) for i in range(count)]
    strings = headers[names][4]
    found = {}
    for name, kind, _, _, offset, size in headers:
        start = strings + name
        held = b"" if kind == 8 else image[offset : offset + size]  # 8: takes no room in the file
        found[image[start : image.index(b"\0", start)].decode()] = held
    return found


ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\S+)'")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers(.*)")


def usage(report: str) -> dict[tuple[str, str], dict[str, int]]:
    """(kernel, arch) -> stack, stores, loads, registers, shared, from what ``-Xptxas -v`` says."""
    found: dict[tuple[str, str], dict[str, int]] = {}
    entry = None
    for line in report.splitlines():
        if match := ENTRY.search(line):
            entry = found.setdefault((match[1], match[2]), {})
        elif entry is not None and (match := STACK.search(line)):
            entry.update(stack=int(match[1]), stores=int(match[2]), loads=int(match[3]))
        elif entry is not None and (match := USED.search(line)):
            shared = re.search(r"(\d+) bytes smem", match[2])
            entry.update(registers=int(match[1]), shared=int(shared[1]) if shared else 0)
    return found
