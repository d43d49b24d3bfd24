"""Builds fastreft._C: the CPU core always, the CUDA core where there is an nvcc and a CUDA build of torch. Beside it, where
this torch's headers allow it, fastreft._quick, which serves this torch alone.

Environment: FASTREFT_BUILD_CUDA=auto|1|0, FASTREFT_QUICK=auto|1|0, CUDA_HOME, TORCH_CUDA_ARCH_LIST, MAX_JOBS, DEBUG=1.
"""

import copy
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
import torch
from setuptools import setup
from setuptools.errors import CompileError


def toolkit() -> str | None:
    """Where the nvcc on PATH has its toolkit, as it says itself. Torch takes the folder above nvcc's for it, which is
    wrong where a script in /usr/local/bin calls the real one."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    told = subprocess.run([nvcc, "--dryrun", "none.cu"], capture_output=True, text=True, check=False)
    for top in re.findall(r"^#\$ TOP=(.+)$", told.stderr + told.stdout, re.MULTILINE):
        home = Path(top.strip()).resolve()
        if (home / "bin" / "nvcc").exists():
            return str(home)
    return None


# cpp_extension looks at CUDA_HOME once, when it is imported.
if torch.version.cuda is not None and not (os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")):
    home = toolkit()
    if home is not None:
        os.environ["CUDA_HOME"] = home
from torch.utils import cpp_extension  # noqa: E402

HEADERS = [str(path) for path in sorted(Path("csrc").rglob("*")) if path.suffix in (".h", ".inl", ".cuh")]
DEFAULT_ARCHES = ("8.0", "9.0", "10.0", "12.0")


def switch(name: str) -> str:
    """An environment variable that is auto, 1 or 0."""
    wanted = os.environ.get(name, "").strip().lower() or "auto"
    if wanted not in ("auto", "1", "0"):
        sys.exit(f"{name} is {wanted!r}; it must be auto, 1 or 0")
    return wanted


QUICK = switch("FASTREFT_QUICK")


def cuda_choice() -> tuple[bool, str]:
    """(build the CUDA core?, the reason as `fastreft info` prints it)."""
    wanted = switch("FASTREFT_BUILD_CUDA")
    if wanted == "0":
        return False, "not built: FASTREFT_BUILD_CUDA was 0 at build time"
    home = cpp_extension.CUDA_HOME
    nvcc = Path(home or "") / "bin" / "nvcc"
    if torch.version.cuda is None:
        missing = "torch is a CPU build"
    elif not home or not nvcc.exists():
        missing = "there is no nvcc (CUDA_HOME or PATH)"
    else:
        return True, f"built with CUDA {torch.version.cuda}"
    if wanted == "1":
        sys.exit(f"FASTREFT_BUILD_CUDA=1 but {missing}; install what is missing or set FASTREFT_BUILD_CUDA=auto")
    return False, f"not built: {missing}"


def set_arches() -> str:
    """TORCH_CUDA_ARCH_LIST, or the default list less what this nvcc does not know."""
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        known = tuple(map(int, str(torch.version.cuda).split(".")[:2]))
        arches = [a for a in DEFAULT_ARCHES if known >= {"10.0": (12, 8), "12.0": (12, 8)}.get(a, (11, 8))]
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(arches) + "+PTX"
    return os.environ["TORCH_CUDA_ARCH_LIST"]


def core() -> cpp_extension.CppExtension:
    with_cuda, reason = cuda_choice()
    debug = os.environ.get("DEBUG", "0") not in ("", "0")
    sources = [str(path) for path in sorted([*Path("csrc/cpu").glob("*.cpp"), *Path("csrc/torch").glob("*.cpp")])]
    # The stable ABI of torch 2.10: one build serves every later torch.
    macros = [
        ("TORCH_TARGET_VERSION", "0x020a000000000000"),
        ("FASTREFT_CUDA_REASON", reason),
        ("FASTREFT_CUDA_ARCHES", set_arches() if with_cuda else "none"),
        ("FASTREFT_TORCH_BUILT_WITH", torch.__version__),
        ("FASTREFT_QUICK", QUICK),
    ]
    cxx = ["-O0", "-g"] if debug else ["-O3", "-g0"]
    # Nobody reads errno or traps after a square root: without these two no loop with one is vectorised.
    flags = {"cxx": [*cxx, "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-Wall"]}
    kind = cpp_extension.CppExtension
    if with_cuda:
        kind = cpp_extension.CUDAExtension
        sources += [str(path) for path in sorted(Path("csrc/cuda").glob("*.cu"))]
        macros.append(("FASTREFT_WITH_CUDA", "1"))
        # torch hides part of its C shim from extensions that do not say they use CUDA.
        macros.append(("USE_CUDA", "1"))
        flags["nvcc"] = [*(["-O0", "-g", "-G"] if debug else ["-O3"]), "-std=c++17", "-lineinfo"]
    built = kind(
        "fastreft._C",
        sources,
        include_dirs=[pybind11.get_include()],
        define_macros=macros,
        extra_compile_args=flags,
        depends=HEADERS,
    )
    # Only the stable C shim is used: what libtorch_python exports changes from one torch to the next.
    built.libraries = [library for library in built.libraries if library != "torch_python"]
    # A toolkit of pip's packages has libcudart.so.13 alone, without the libcudart.so that -lcudart looks for.
    there = {path.name for folder in built.library_dirs for path in Path(folder).glob("libcudart.so*")}
    if there and "libcudart.so" not in there:
        built.libraries = [f":{min(there)}" if library == "cudart" else library for library in built.libraries]
    return built


def quick() -> cpp_extension.CppExtension:
    flags = ["-O0", "-g"] if os.environ.get("DEBUG", "0") not in ("", "0") else ["-O2", "-g0"]
    return cpp_extension.CppExtension(
        "fastreft._quick",
        [*(str(path) for path in sorted(Path("csrc/quick").glob("*.cpp"))), "csrc/cpu/positions.cpp"],
        extra_compile_args=[*flags, "-fvisibility=hidden", "-Wall"],
        depends=HEADERS,
        optional=QUICK == "auto",
    )


class Build(cpp_extension.BuildExtension):
    def finalize_options(self):
        super().finalize_options()
        # Side by side, but where MAX_JOBS says how many compilers may run at once: each extension would start that many.
        if self.parallel is None and not os.environ.get("MAX_JOBS"):
            self.parallel = len(self.extensions)

    def build_extensions(self):
        if QUICK == "0":
            self.remove_quick()
        super().build_extensions()

    def build_extension(self, ext):
        # Ninja keeps its file and its log where the objects go: a folder for each extension.
        own = copy.copy(self)
        own.build_temp = str(Path(self.build_temp) / ext.name.rpartition(".")[2])
        try:
            super(Build, own).build_extension(ext)
        except Exception as error:
            if not ext.optional:
                raise
            self.remove_quick()
            # setuptools goes on after its own error alone, and ninja's is another.
            raise CompileError(str(error)) from error

    def remove_quick(self):
        """One of an earlier build, of another torch or another core, must not be taken for this one's."""
        for old in (*Path("fastreft").glob("_quick*.so"), Path(self.get_ext_fullpath("fastreft._quick"))):
            old.unlink(missing_ok=True)


setup(ext_modules=[core(), *([] if QUICK == "0" else [quick()])], cmdclass={"build_ext": Build})
