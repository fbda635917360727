"""The shape of the sources: functions of at most 100 lines, calls that name their arguments."""

import ast
import re
import runpy
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LONGEST_FUNCTION, MOST_POSITIONAL = 100, 5

#: Methods whose arguments are sizes or dimensions, in an order that everyone knows.
SIZES = {"view", "reshape", "permute", "expand", "new_empty", "new_zeros", "new_ones"}
#: A registered op takes the arguments of its schema, and an autograd function those of its forward, by position. In
#: purify_fast/ops, ``call`` is the one of an op's reference, handle and autograd function that serves. ``launch``
#: starts a Triton kernel, whose tensors come in the order of the op's schema.
BY_SCHEMA = {"handle", "apply", "OP", "BACKWARD", "call", "launch"}
#: Functions of any number of equal arguments.
EQUAL_ARGUMENTS = {"zip", "max", "min", "save_for_backward"}


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


PYTHON = sorted(path for pattern in ("purify_fast/**/*.py", "kernels/*.py") for path in ROOT.glob(pattern))


def excused(lines: list[str], line: int, why: str) -> bool:
    """Return True if the comment directly above ``line`` (counted from 1) says why the code is ``why``."""
    above = line - 2
    while above >= 0 and lines[above].lstrip().startswith("#"):
        if re.match(rf"\s*# \w+( \w+)? (is|are) {why} because ", lines[above]):
            return True
        above -= 1
    return False


def docstring_lines(node: ast.AST) -> int:
    body = getattr(node, "body", None)
    if (
        isinstance(body, list)
        and body
        and isinstance(body[0], ast.Expr)
        and isinstance(getattr(body[0].value, "value", None), str)
    ):
        return body[0].end_lineno - body[0].lineno + 1
    return 0


def long_functions(path: Path) -> Iterator[str]:
    source = path.read_text()
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = node.end_lineno - node.lineno + 1 - docstring_lines(node)
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            if length > LONGEST_FUNCTION and not excused(lines, first, "long"):
                yield f"{named(path)}:{node.lineno} {node.name} has {length} lines"


def callee(node: ast.Call) -> str:
    if isinstance(node.func, ast.Attribute):
        return node.func.attr
    return node.func.id if isinstance(node.func, ast.Name) else ""


def positional_calls(path: Path) -> Iterator[str]:
    source = path.read_text()
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or len(node.args) <= MOST_POSITIONAL:
            continue
        if callee(node) in SIZES | BY_SCHEMA | EQUAL_ARGUMENTS or excused(lines, node.lineno, "positional"):
            continue
        yield f"{named(path)}:{node.lineno} calls {ast.unparse(node.func)} with {len(node.args)} positional arguments"


def sniffing(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and callee(node) == "hasattr":
            yield f"{named(path)}:{node.lineno} asks hasattr: purify_fast/protocols.py says what an object has"


@pytest.mark.parametrize("check", [long_functions, positional_calls, sniffing])
def test_structure(check):
    found = [line for path in PYTHON for line in check(path)]
    assert not found, "\n".join(["", *found])


def test_no_module_of_the_benchmarks_has_the_name_of_a_module_of_the_package():
    own = {path.stem for path in PYTHON} - {"__init__", "__main__"}
    theirs = [*(ROOT / "benchmarks").rglob("*.py")]
    assert len(theirs) > 20 and sorted(named(path) for path in theirs if path.stem in own) == []


#: Modules that every method has, and the class from which the classes of a folder derive.
SHARED_NAMES = {"base", "config", "defence", "method", "recipes", "task"}


def test_no_two_modules_share_a_name():
    modules = [path for path in (ROOT / "purify_fast").rglob("*.py") if path.stem not in ("__init__", "__main__")]
    of_each = Counter(path.stem for path in modules)
    assert len(modules) > 100 and {name for name, count in of_each.items() if count > 1} == SHARED_NAMES


def test_everything_is_formatted_without_a_skip():
    folders = ("purify_fast", "kernels", "benchmarks", "tests")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    skip = "# fmt: " + "skip"
    assert len(files) > 300 and [named(path) for path in files if skip in path.read_text()] == []


#: The most code lines that a module and all that it imports may have: what must be read to understand the module.
MOST_READ = {
    "purify_fast.attacks.pgd": 1880,
    "purify_fast.methods.carso.defence": 2380,
    "purify_fast.methods.arrest.task": 2200,
    "purify_fast.judge.runner": 7550,
}
#: The count of code lines by which `make lint` compares the package with its budgets.
code_lines = runpy.run_path(str(ROOT / ".ci" / "promises.py"))["code_lines"]
#: The files of modules. Triton kernels are imported as ``purify_fast.kernels``.
MODULES = {
    f"purify_fast.{name}".replace("purify_fast.purify_fast", "purify_fast").removesuffix(".__init__"): path
    for path in PYTHON
    for name in [".".join(path.relative_to(ROOT).with_suffix("").parts)]
}


def home(module: str, name: str) -> str:
    """The module of a name that a package passes on."""
    if f"{module}.{name}" in MODULES:
        return f"{module}.{name}"
    if module in MODULES and MODULES[module].name == "__init__.py":
        for node in ast.walk(ast.parse(MODULES[module].read_text())):
            if isinstance(node, ast.ImportFrom) and any((one.asname or one.name) == name for one in node.names):
                return home(imported(module, node), name)
    return module


def imported(module: str, node: ast.ImportFrom) -> str:
    """The absolute name of the module in an import."""
    parts = module.split(".") if MODULES[module].name == "__init__.py" else module.split(".")[:-1]
    above = parts[: len(parts) - node.level + 1] if node.level else []
    return ".".join([*above, *([node.module] if node.module else [])])


def needed(module: str, node: ast.AST) -> Iterator[str]:
    """The modules that a module needs when it is imported, not those for types and those inside functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ImportFrom):
            yield from (home(imported(module, child), one.name) for one in child.names)
        elif not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.If)):
            yield from needed(module, child)


@pytest.mark.parametrize("module", MOST_READ)
def test_little_must_be_read_to_understand_a_module(module):
    seen, todo = set(), {module}
    while todo:
        seen.add(one := todo.pop())
        todo |= {*needed(one, ast.parse(MODULES[one].read_text()))} & MODULES.keys() - seen
    read = sum(code_lines(MODULES[one].read_text()) for one in seen)
    assert read <= MOST_READ[module], f"{module} reaches {read} code lines"
