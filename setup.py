"""Builds purify_fast._C, the optional compiled extension; the pure-Python package never needs it.

PURIFY_FAST_BUILD = auto (default) | none | cpu | cuda decides. No GPU is needed, and none is looked for: the CUDA part
is compiled for TORCH_CUDA_ARCH_LIST, or for every architecture of ARCHS that nvcc knows. torch must be importable
(`pip install --no-build-isolation`); without it, `auto` installs the pure-Python package.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Mapping
from pathlib import Path

import setuptools
from setuptools import setup

MODES = ("auto", "none", "cpu", "cuda")
ARCHS = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")  # the last one also as PTX, for GPUs to come
ROOT = Path(__file__).resolve().parent
HOW = (
    "in an environment that has torch, run: pip install 'setuptools>=77' ninja && pip install --no-build-isolation -e ."
)

DEFINES = [
    "-DTORCH_TARGET_VERSION=0x020b000000000000",  # the stable ABI of torch 2.11: runs on every later one
    "-DPy_LIMITED_API=0x030A0000",
]
CXX_FLAGS = [
    "-std=c++20",
    "-O3",
    "-fno-math-errno",  # sqrt is one instruction
    "-fno-trapping-math",  # selects may evaluate both sides: needed to vectorise them; NaN semantics stay
    "-fvisibility=hidden",
]
NVCC_FLAGS = ["-std=c++20", "-O3", "-DUSE_CUDA", "--expt-relaxed-constexpr", "--fmad=false", "-lineinfo"]


class Impossible(Exception):
    """Why something cannot be built, and what would help."""


def build_mode(environ: Mapping[str, str]) -> str:
    mode = environ.get("PURIFY_FAST_BUILD", "auto") or "auto"
    if mode not in MODES:
        raise SystemExit(f"PURIFY_FAST_BUILD={mode!r} is unknown; allowed: {', '.join(MODES)}")
    return mode


def is_toolkit(folder: Path) -> bool:
    """Whether a program can be compiled and linked with the CUDA toolkit in ``folder``."""
    return all((folder / part).exists() for part in ("bin/nvcc", "include/cuda_runtime.h", "lib64/libcudart.so"))


def folder_behind(nvcc: Path) -> Path:
    """The toolkit's folder, through symlinks and wrapper scripts."""
    nvcc = nvcc.resolve()
    if is_toolkit(nvcc.parent.parent):
        return nvcc.parent.parent
    try:  # a wrapper script: the real nvcc says where it lives
        run = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return nvcc.parent.parent
    here = re.search(r"^#\$ _HERE_=(.+)$", run.stdout + run.stderr, re.MULTILINE)
    return Path(here[1]).resolve().parent if here else nvcc.parent.parent


def find_toolkit(environ: Mapping[str, str], which: Callable[[str], str | None] = shutil.which) -> Path:
    """The folder of a complete CUDA toolkit; raises Impossible, saying where it was looked for."""
    looked = []
    if environ.get("CUDA_HOME"):
        looked.append(Path(environ["CUDA_HOME"]))
    nvcc = which("nvcc")
    if nvcc:
        looked.append(folder_behind(Path(nvcc)))
    for folder in looked:
        if is_toolkit(folder):
            return folder
    where = ", ".join(map(str, looked)) or "neither CUDA_HOME nor nvcc on the PATH was found"
    raise Impossible(
        "no complete CUDA toolkit (bin/nvcc, include/cuda_runtime.h, lib64/libcudart.so): "
        f"{where}; install one and set CUDA_HOME to its folder"
    )


def arch_list(environ: Mapping[str, str], listed: str) -> str:
    """TORCH_CUDA_ARCH_LIST, or what of ARCHS appears in ``listed``, the output of `nvcc --list-gpu-arch`."""
    if environ.get("TORCH_CUDA_ARCH_LIST"):
        return environ["TORCH_CUDA_ARCH_LIST"]
    known = [arch for arch in ARCHS if re.search(rf"_{arch.replace('.', '')}\b", listed)]
    if not known:
        raise Impossible(f"nvcc knows none of the architectures {', '.join(ARCHS)}; set TORCH_CUDA_ARCH_LIST")
    return ";".join([*known[:-1], known[-1] + "+PTX"])


def check_cuda(torch_cuda: str | None, environ: Mapping[str, str]) -> tuple[Path, str]:
    """The toolkit and the architectures to build for; raises Impossible."""
    if torch_cuda is None:
        raise Impossible("this torch is a CPU build; install a CUDA build of torch")
    toolkit = find_toolkit(environ)
    version = subprocess.run([toolkit / "bin/nvcc", "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.", version)
    if not release or release[1] != torch_cuda.split(".")[0]:
        found = release[1] if release else "an unknown version"
        raise Impossible(f"{toolkit} is CUDA {found}, torch was built for {torch_cuda}: the major versions must agree")
    listed = subprocess.run([toolkit / "bin/nvcc", "--list-gpu-arch"], capture_output=True, text=True).stdout
    return toolkit, arch_list(environ, listed)


def compiler(environ: Mapping[str, str], which: Callable[[str], str | None] = shutil.which) -> str:
    """The C++ compiler; raises Impossible."""
    for name in (environ.get("CXX"), "g++", "c++", "clang++"):
        if name and which(name.split()[0]):
            return name
    raise Impossible("no C++ compiler found (CXX, g++, c++, clang++); install one, for example `apt install g++`")


def check_setuptools(version: str) -> None:
    """End with one line where setuptools is too old to read pyproject.toml, for which it would take forty.

    Args:
        version: of setuptools.

    Raises:
        SystemExit: it is older than 77.
    """
    if int(version.split(".")[0]) < 77:
        raise SystemExit(f"purify_fast needs setuptools >= 77, this is {version}: {HOW}")


def sources_digest() -> str:
    """The hash of the C++ sources, by the package's own function; importing the package takes torch."""
    spec = importlib.util.spec_from_file_location("_sources", ROOT / "purify_fast" / "_sources.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.digest(ROOT / "csrc")


def say(line: str) -> None:
    print(f"purify_fast: {line}", file=sys.stderr, flush=True)


def extension(mode: str) -> dict:
    """The arguments of setup() that build the extension; none for the pure-Python package."""
    if mode == "none":
        return {}
    try:
        if importlib.util.find_spec("torch") is None:
            raise Impossible(f"torch is not importable here; {HOW}")
        compiler(os.environ)
        return torch_extension(mode)
    except Impossible as reason:
        if mode != "auto":
            raise SystemExit(f"PURIFY_FAST_BUILD={mode} is impossible: {reason}") from None
        say(f"pure-Python install, the compiled kernels are left out: {reason}")
        return {}


def torch_extension(mode: str) -> dict:
    import torch

    toolkit, archs = None, ""
    if mode in ("auto", "cuda"):
        try:
            toolkit, archs = check_cuda(torch.version.cuda, os.environ)
            os.environ["CUDA_HOME"] = str(toolkit)  # read when cpp_extension is imported, which guesses otherwise
            os.environ["TORCH_CUDA_ARCH_LIST"] = archs
        except Impossible as reason:
            if mode == "cuda":
                raise
            say(f"building the CPU kernels only: {reason}")

    from setuptools.errors import CompileError
    from torch.utils import cpp_extension

    # a path of the tree, relative: the build backend insists
    sources = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("csrc/cpu/*.cpp"))]
    flags = {"cxx": CXX_FLAGS + DEFINES}
    make = cpp_extension.CppExtension
    if toolkit:
        sources += [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("csrc/cuda/*.cu"))]
        flags = {"cxx": [*flags["cxx"], "-DUSE_CUDA"], "nvcc": NVCC_FLAGS + DEFINES}
        make = cpp_extension.CUDAExtension
    # free-threaded Pythons do not load abi3 modules
    stable = not sysconfig.get_config_var("Py_GIL_DISABLED")
    module = make("purify_fast._C", sources, extra_compile_args=flags, py_limited_api=stable, optional=mode == "auto")
    facts = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda if toolkit else None,
        "archs": archs,
        "flags": " ".join(CXX_FLAGS),
    }

    class Build(cpp_extension.BuildExtension):
        """Adds the record `purify-fast info` reads; in `auto`, a failing compiler costs only what it compiles."""

        def build_extension(self, ext) -> None:
            try:
                super().build_extension(ext)
            except Exception as error:
                if not ext.optional:
                    raise
                cpu = [source for source in ext.sources if not source.endswith(".cu")]
                if cpu != ext.sources:
                    say(f"building the CPU kernels only, compiling the CUDA part failed: {error}")
                    ext.sources, facts["cuda"], facts["archs"] = cpu, None, ""
                    ext.libraries = [library for library in ext.libraries if "cuda" not in library]
                    self.build_extension(ext)
                    return
                say(f"pure-Python install, compiling the kernels failed: {error}")
                raise CompileError(str(error)) from error  # which setuptools makes a warning

        def run(self) -> None:
            super().run()
            built = Path(self.get_ext_fullpath("purify_fast._C"))
            if built.exists():
                record = {"version": self.distribution.get_version(), **facts, "sources": sources_digest()}
                part = built.with_name(f"_build.json.{os.getpid()}")
                part.write_text(json.dumps(record, indent=1) + "\n")
                part.replace(built.with_name("_build.json"))

    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}} if stable else {},
    }


if __name__ == "__main__":
    os.chdir(ROOT)
    check_setuptools(setuptools.__version__)
    setup(**extension(build_mode(os.environ)))
