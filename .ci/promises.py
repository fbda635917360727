"""Compare the code lines of each promise of the package with its budget; a part of `make lint`.

A code line is a line that is neither blank, nor a comment, nor part of a docstring. A change that raises a budget
lowers another, and its commit names both. `python .ci/promises.py --write` makes the budgets what the files have.
"""

from __future__ import annotations

import ast
import fnmatch
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: The largest sums over all promises: code lines of the package without kernels, and its Python files.
MOST_LINES, MOST_FILES = 18282, 164
#: By promise: the budget, and the patterns of its files below `purify_fast`. The longest pattern that fits decides.
PROMISES = {
    "CARSO": (580, "methods/carso/*"),
    "AToP": (610, "methods/atop/*"),
    "ARREST": (235, "methods/arrest/*"),
    "diffusion": (570, "methods/diffusion/*", "models/unet.py"),
    "a method as a command, recipes, saved defences": (307, "methods/*"),
    "training loop, resume, several processes": (1334, "training/*", "_process.py"),
    "training of a classifier": (112, "training/classifier.py"),
    "captured and compiled attack steps": (511, "speed/graphs/*"),
    "frozen copies": (1378, "speed/*"),
    "memory that runs out": (106, "speed/memory.py", "_memory.py"),
    "ops: definitions": (1830, "ops/*"),
    "ops: backends, verification, tuning": (730, "ops/dispatch/*", "_library.py"),
    "nn modules": (69, "nn.py"),
    "attacks that a user calls": (1199, "attacks/*"),
    "bases of defences, protocols": (542, "defences/*", "protocols.py"),
    "classifiers, layers, foreign weights": (564, "models/*"),
    "data": (467, "data/*"),
    "zoo": (113, "zoo/*"),
    "commands": (843, "cli/*", "__main__.py"),
    "searches: Auto-PGD, FAB-T, Square, StAdv": (1194, "judge/searches/*"),
    "AutoAttack's class": (163, "autoattack.py"),
    "lists of attacks, an evaluation's request": (699, "judge/request/*"),
    "an evaluation's run and its rows": (1364, "judge/*", "evaluation/*", "model_state.py"),
    "probes and alarms": (581, "judge/alarms/*", "judge/suspicion.py"),
    "surrogates": (565, "judge/surrogates/*"),
    "certificates": (662, "judge/certificates/*", "cli/certify.py"),
    "reports": (483, "judge/show/*", "_templates.py"),
    "checks of arguments and files, the package's face": (471, "*"),
}


def code_lines(text: str) -> int:
    """Return the number of lines without blank lines, comments and docstrings."""
    lines = [line.strip() for line in text.splitlines()]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            start, end = node.body[0].lineno - 1, node.body[0].end_lineno
            lines[start:end] = [""] * (end - start)
    return sum(bool(line) and not line.startswith("#") for line in lines)


def promise_of(name: str) -> str:
    """Return the promise that a file of the package keeps."""
    fitting = [(len(p), promise) for promise, (_, *ps) in PROMISES.items() for p in ps if fnmatch.fnmatch(name, p)]
    return max(fitting)[1]


def main() -> int:
    package = ROOT / "purify_fast"
    paths = [path for path in package.rglob("*.py") if package / "kernels" not in path.parents]
    used = dict.fromkeys(PROMISES, 0)
    for path in paths:
        used[promise_of(path.relative_to(package).as_posix())] += code_lines(path.read_text())
    if "--write" in sys.argv:
        text = Path(__file__).read_text()
        for promise, lines in used.items():
            text = re.sub(rf'("{re.escape(promise)}": \()\d+', rf"\g<1>{lines}", text)
        text = re.sub(r"(\nMOST_LINES, MOST_FILES = ).*", rf"\g<1>{sum(used.values())}, {len(paths)}", text)
        Path(__file__).write_text(text)
        return 0
    over = [
        f"{promise}: {used[promise]} code lines, budget {PROMISES[promise][0]}"
        for promise in used
        if used[promise] > PROMISES[promise][0]
    ]
    if sum(budget for budget, *_ in PROMISES.values()) > MOST_LINES or len(paths) > MOST_FILES:
        over.append(f"the package: {len(paths)} files of {MOST_FILES}, budgets of {MOST_LINES} lines in all")
    print("\n".join(over) or f"{sum(used.values())} code lines in {len(paths)} files, within the budgets")
    return bool(over)


if __name__ == "__main__":
    sys.exit(main())
