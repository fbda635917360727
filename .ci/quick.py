"""Run the tests of the folders that differ from the main branch: `make quick`.

`python .ci/quick.py [COMMIT]` compares the working tree with the last commit that it has in common with COMMIT, which
is `origin/main`, or else `main`. It prints each folder of tests that it runs, and each changed file that has no tests
of its own. It never runs nothing in silence: without a folder to run, it ends with status 1.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
#: Files and folders whose tests have other names.
ELSEWHERE = {
    "kernels": ("tests/interpreter", "tests/aot"),
    "csrc": ("tests/cpp", "tests/ops"),
    "docs": ("tests/docs",),
    "README.md": ("tests/docs",),
    "CHANGELOG.md": ("tests/docs",),
    "CONTRIBUTING.md": ("tests/docs",),
    "SECURITY.md": ("tests/docs",),
    "CODE_OF_CONDUCT.md": ("tests/docs",),
    "setup.py": ("tests/test_packaging.py",),
    "pyproject.toml": ("tests/test_packaging.py",),
    "MANIFEST.in": ("tests/test_packaging.py",),
    "constraints.txt": ("tests/test_packaging.py",),
    "Makefile": ("tests/test_packaging.py",),
    ".pre-commit-config.yaml": ("tests/test_packaging.py",),
    ".ci": ("tests/test_packaging.py", "tests/docs"),
    ".github": ("tests/test_packaging.py",),
    ".readthedocs.yaml": ("tests/test_packaging.py",),
}
#: Folders of tests that pytest does not run as they are: the tests in C++, and those in Triton's interpreter.
CPP, INTERPRETER = "tests/cpp", "tests/interpreter"


def git(*arguments: str) -> list[str]:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")[
        :-1
    ]


def tests_of(file: str) -> tuple[str, ...]:
    """Return the folders (or files) of tests for a changed file, or nothing if it has no tests of its own."""
    path = PurePosixPath(file)
    top, name = path.parts[0], path.stem.lstrip("_")
    if top in ELSEWHERE:
        return ELSEWHERE[top]
    # The folder of tests with the same path or, if there is none, that of the folder above.
    folder = Path("tests", *path.parent.parts[top in ("purify_fast", "tests") :])
    while folder != Path("tests") and not (ROOT / folder).is_dir():
        folder = folder.parent
    if folder == Path("tests"):
        folder /= f"test_{name.removeprefix('test_')}.py"
    return (folder.as_posix(),) if (ROOT / folder).exists() else ()


def commands(folders: list[str]) -> list[tuple[list[str], dict[str, str]]]:
    """Return the commands that run the folders, with their environment variables."""
    pytest = [sys.executable, "-m", "pytest", "-n", "auto", "--dist", "worksteal", "-m", "not slow"]
    plain = [folder for folder in folders if folder not in (CPP, INTERPRETER)]
    found: list[tuple[list[str], dict[str, str]]] = [(["make", "test-cpp"], {})] if CPP in folders else []
    found += [([*pytest, *plain], {})] if plain else []
    return found + ([([*pytest, INTERPRETER], {"TRITON_INTERPRET": "1"})] if INTERPRETER in folders else [])


def main(base: str | None) -> int:
    known = [name for name in ("origin/main", "main") if git("branch", "--all", "--list", name, f"remotes/{name}")]
    (common,) = git("merge-base", "HEAD", base or known[0])
    changed = sorted({*git("diff", "--name-only", common), *git("ls-files", "--others", "--exclude-standard")})
    folders = sorted({folder for file in changed for folder in tests_of(file)})
    # A folder inside of another one runs with it.
    folders = [one for one in folders if not any(one.startswith(f"{other}/") for other in folders)]
    without = [file for file in changed if not tests_of(file)]
    print(f"compared with {base or known[0]} ({common[:8]}): {len(changed)} changed files")
    print("\n".join(f"runs {folder}" for folder in folders) or "runs nothing: `make test` runs all tests")
    print("\n".join(f"no tests of its own: {file}" for file in without), flush=True)
    waiting = {"OMP_WAIT_POLICY": "PASSIVE", "OPENBLAS_NUM_THREADS": "1"}
    codes = [
        subprocess.run(command, cwd=ROOT, env=os.environ | waiting | variables).returncode
        for command, variables in commands(folders)
    ]
    return max((abs(code) for code in codes), default=1)


if __name__ == "__main__":
    sys.exit(main(*(sys.argv[1:2] or [None])))
