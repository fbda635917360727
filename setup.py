"""Build purify_fast._C, the optional extension with the compiled CPU kernels.

The environment variable PURIFY_FAST_BUILD has three values. `cpu` builds the extension, and fails if the build is
impossible. `none` does not build the extension. `auto`, the default, builds the extension if possible. The build needs
torch in the environment, so call `pip install --no-build-isolation`. GPU kernels are written in Triton, and need no
build.
"""

from __future__ import annotations

import importlib.util
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
    # With the stable ABI of torch 2.11, the extension runs with every later version of torch.
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
    "-DPy_LIMITED_API=0x030A0000",
]
CXX_FLAGS = [
    "-std=c++20",
    "-O3",
    # Python's own flags ask for debug information, which would make the extension six times as large.
    "-g0",
    # This option lets the compiler use a single instruction for sqrt.
    "-fno-math-errno",
    # Vectorized code evaluates both sides of a selection, which this option allows. The option does not change the
    # results for NaN.
    "-fno-trapping-math",
    "-fvisibility=hidden",
]


class Impossible(Exception):
    """Raised if the extension cannot be built. The message says why, and what to do."""


def build_mode(environ: Mapping[str, str]) -> str:
    mode = environ.get("PURIFY_FAST_BUILD", "auto") or "auto"
    if mode not in MODES:
        raise SystemExit(f"PURIFY_FAST_BUILD must be one of {', '.join(MODES)}, got {mode!r}")
    return mode


def pip_arguments() -> list[str]:
    """The user's arguments of ``pip``, or ``install .`` if they cannot be read from the parent process."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")[:-1]
    except OSError:
        words = []
    names = [re.fullmatch(r"pip[0-9.]*", Path(word).name) is not None for word in words[:3]]
    typed = words[names.index(True) + 1 :] if True in names else []
    return typed if typed[:1] in (["install"], ["wheel"]) else ["install", "."]


def how(environ: Mapping[str, str]) -> str:
    """The commands that build the kernels: the user's command with the missing parts added."""
    command, *rest = pip_arguments()
    rest = ["--no-build-isolation", *(word for word in rest if word != "--no-build-isolation")]
    chosen = environ.get("PURIFY_FAST_BUILD")
    mode = f"PURIFY_FAST_BUILD={shlex.quote(chosen)} " if chosen else ""
    again = f"{mode}pip {shlex.join([command, *rest])}"
    return f"in an environment that has torch, run: pip install 'setuptools>=77' ninja && {again}"


def compiler(environ: Mapping[str, str], which: Callable[[str], str | None] = shutil.which) -> str:
    """The name of the C++ compiler. Raises Impossible if there is none."""
    for name in (environ.get("CXX"), "g++", "c++", "clang++"):
        if name and which(name.split()[0]):
            return name
    raise Impossible("no C++ compiler found (CXX, g++, c++, clang++); install one, for example `apt install g++`")


def check_setuptools(version: str) -> None:
    """End with a short message if setuptools is too old to read pyproject.toml. setuptools' own error has forty lines.

    Args:
        version: version of setuptools.

    Raises:
        SystemExit: the version is below 77. The message contains the command that installs the package.
    """
    if int(version.split(".")[0]) < 77:
        raise SystemExit(f"purify_fast needs setuptools >= 77, got {version}: {how(os.environ)}")


def say(line: str) -> None:
    print(f"purify_fast: {line}", file=sys.stderr, flush=True)


def extension(mode: str) -> dict:
    """The arguments of setup() that build the extension. The dictionary is empty for the pure-Python package."""
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
    from setuptools.errors import CompileError
    from torch.utils import cpp_extension

    # The build backend requires paths relative to the root of the checkout.
    sources = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("csrc/cpu/*.cpp"))]
    flags = {"cxx": CXX_FLAGS + DEFINES}
    # Free-threaded Pythons do not load abi3 modules.
    stable = not sysconfig.get_config_var("Py_GIL_DISABLED")
    module = cpp_extension.CppExtension(
        "purify_fast._C", sources, extra_compile_args=flags, py_limited_api=stable, optional=mode == "auto"
    )

    class Build(cpp_extension.BuildExtension):
        """Builds the extension. If compiling fails in the mode `auto`, the pure-Python package is installed."""

        def build_extension(self, ext) -> None:
            try:
                # Remove the extension of an earlier build. Otherwise it could be mistaken for the result of this build,
                # or setuptools could skip this build.
                Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
                super().build_extension(ext)
            except Exception as error:
                if not ext.optional:
                    raise
                say(f"pure-Python install, compiling the kernels failed: {error}")
                # setuptools turns this error into a warning.
                raise CompileError(str(error)) from error

    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}} if stable else {},
    }


if __name__ == "__main__":
    os.chdir(ROOT)
    check_setuptools(setuptools.__version__)
    setup(**extension(build_mode(os.environ)))
