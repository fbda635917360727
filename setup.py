"""Builds purify_fast._C, the optional compiled extension; the pure-Python package never needs it.

PURIFY_FAST_BUILD = auto (default) | none | cpu decides. It has the kernels of the CPU; those of GPUs are Triton's.
torch must be importable (`pip install --no-build-isolation`); without it, `auto` installs the pure-Python package.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Callable, Mapping
from pathlib import Path

import setuptools
from setuptools import setup

MODES = ("auto", "none", "cpu")
ROOT = Path(__file__).resolve().parent

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


class Impossible(Exception):
    """The extension cannot be built; the text says why, and what to do."""


def build_mode(environ: Mapping[str, str]) -> str:
    mode = environ.get("PURIFY_FAST_BUILD", "auto") or "auto"
    if mode not in MODES:
        raise SystemExit(f"PURIFY_FAST_BUILD must be one of {', '.join(MODES)}, got {mode!r}")
    return mode


def pip_arguments() -> list[str]:
    """The words that were typed after ``pip``, or the usual words if the parent process does not show them."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")[:-1]
    except OSError:
        words = []
    names = [re.fullmatch(r"pip[0-9.]*", Path(word).name) is not None for word in words[:3]]
    typed = words[names.index(True) + 1 :] if True in names else []
    return typed if typed[:1] in (["install"], ["wheel"]) else ["install", "."]


def how(environ: Mapping[str, str]) -> str:
    """The command that builds the kernels: the command that was typed, with the missing parts added."""
    command, *rest = pip_arguments()
    rest = ["--no-build-isolation", *(word for word in rest if word != "--no-build-isolation")]
    chosen = environ.get("PURIFY_FAST_BUILD")
    mode = f"PURIFY_FAST_BUILD={shlex.quote(chosen)} " if chosen else ""
    again = f"{mode}pip {shlex.join([command, *rest])}"
    return f"in an environment that has torch, run: pip install 'setuptools>=77' ninja && {again}"


def compiler(environ: Mapping[str, str], which: Callable[[str], str | None] = shutil.which) -> str:
    """The C++ compiler; raises Impossible."""
    for name in (environ.get("CXX"), "g++", "c++", "clang++"):
        if name and which(name.split()[0]):
            return name
    raise Impossible("no C++ compiler found (CXX, g++, c++, clang++); install one, for example `apt install g++`")


def check_setuptools(version: str) -> None:
    """End with one line if setuptools is too old to read pyproject.toml; its own error would take forty lines.

    Args:
        version: of setuptools.

    Raises:
        SystemExit: it is older than 77; the message repeats the command that was typed.
    """
    if int(version.split(".")[0]) < 77:
        raise SystemExit(f"purify_fast needs setuptools >= 77, got {version}: {how(os.environ)}")


def csrc_hash() -> str:
    """The hash of the C++ sources, by the package's own function; importing the package takes torch."""
    spec = importlib.util.spec_from_file_location("_files", ROOT / "purify_fast" / "_files.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.csrc_hash(ROOT / "csrc")


def say(line: str) -> None:
    print(f"purify_fast: {line}", file=sys.stderr, flush=True)


def extension(mode: str) -> dict:
    """The arguments of setup() that build the extension; none for the pure-Python package."""
    if mode == "none":
        return {}
    try:
        if importlib.util.find_spec("torch") is None:
            raise Impossible(f"torch is not importable here; {how(os.environ)}")
        compiler(os.environ)
        return torch_extension(mode)
    except Impossible as reason:
        if mode != "auto":
            raise SystemExit(f"PURIFY_FAST_BUILD={mode} is impossible: {reason}") from None
        say(f"pure-Python install, the compiled kernels are left out: {reason}")
        return {}


def torch_extension(mode: str) -> dict:
    import torch
    from setuptools.errors import CompileError
    from torch.utils import cpp_extension

    # The build backend insists on paths relative to the root of the tree.
    sources = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("csrc/cpu/*.cpp"))]
    flags = {"cxx": CXX_FLAGS + DEFINES}
    # Free-threaded Pythons do not load abi3 modules.
    stable = not sysconfig.get_config_var("Py_GIL_DISABLED")
    module = cpp_extension.CppExtension(
        "purify_fast._C", sources, extra_compile_args=flags, py_limited_api=stable, optional=mode == "auto"
    )
    facts = {"torch": torch.__version__, "flags": " ".join(CXX_FLAGS)}

    class Build(cpp_extension.BuildExtension):
        """Adds the record that `purify-fast info` reads. In `auto` a failing compiler only leaves the kernels out."""

        compiled = False  # by this run

        def build_extension(self, ext) -> None:
            try:
                # Remove the extension of an earlier build. It could be taken for the new one, or for one that need not
                # be built again.
                Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
                super().build_extension(ext)
                self.compiled = True
            except Exception as error:
                if not ext.optional:
                    raise
                say(f"pure-Python install, compiling the kernels failed: {error}")
                raise CompileError(str(error)) from error  # which setuptools makes a warning

        def run(self) -> None:
            built = Path(self.get_ext_fullpath("purify_fast._C"))
            # If compiling fails, an older extension stays. Without its record it is not loaded in a checkout.
            built.with_name("_build.json").unlink(missing_ok=True)
            super().run()
            if self.compiled:
                record = {"version": self.distribution.get_version(), **facts, "sources": csrc_hash()}
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
