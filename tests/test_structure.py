"""The shape of the sources: lengths of files and functions, calls that name their arguments, imports, words.

An exception is written where it is made, as a comment directly above what it excuses: ``# long because ...`` (``//`` in
C++) above a function, or in the first lines of a file; ``# positional because ...`` above a call. An import inside a
function has its reason in a comment on the line above.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LONGEST_FUNCTION, LONGEST_FILE, MOST_POSITIONAL = 60, 400, 5

#: Methods whose arguments are sizes or dimensions, in an order that everyone knows.
SIZES = {"view", "reshape", "permute", "expand", "new_empty", "new_zeros", "new_ones"}
#: A registered op takes the arguments of its schema, and an autograd function those of its forward, by position. In
#: purify_fast/ops, ``call`` is the one of an op's reference, handle and autograd function that serves.
BY_SCHEMA = {"handle", "apply", "OP", "BACKWARD", "call"}
#: Functions of any number of equal arguments.
EQUAL_ARGUMENTS = {"zip", "max", "min", "save_for_backward"}

PRIVATE_WORDS = re.compile(r"\b(ours|quicken|untapped|silent|said)\b")


def tracked(*patterns: str) -> list[Path]:
    """The files of the repository that match; the kernels are seen at their own place, not through the link."""
    found = (path for pattern in patterns for path in ROOT.glob(pattern))
    return sorted(path for path in found if "purify_fast/kernels" not in path.as_posix())


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def room(path: Path) -> str:
    """The folder a source is in, methods and csrc by their parts; or the file itself, directly in purify_fast."""
    parts = path.relative_to(ROOT).parts
    if parts[0] == "kernels":
        return parts[0]
    return "/".join(parts[: 3 if parts[:2] == ("purify_fast", "methods") and len(parts) > 3 else 2])


PYTHON = tracked("purify_fast/**/*.py", "kernels/*.py")
CPP = tracked("csrc/**/*.h", "csrc/**/*.cpp")


def excused(lines: list[str], line: int, why: str) -> bool:
    """Whether the comment directly above ``line`` (counted from 1) gives the reason ``why`` asks for."""
    above = line - 2
    while above >= 0 and re.match(r"\s*(#|//)", lines[above]):
        if re.match(rf"\s*(#|//) {why} because ", lines[above]):
            return True
        above -= 1
    return False


def long_file(path: Path) -> Iterator[str]:
    lines = path.read_text().splitlines()
    if len(lines) > LONGEST_FILE and not any(re.match(r"(#|//) long because ", line) for line in lines[:40]):
        yield f"{named(path)} has {len(lines)} lines"


def docstring_lines(node: ast.AST) -> int:
    body = getattr(node, "body", None)
    if body and isinstance(body[0], ast.Expr) and isinstance(getattr(body[0].value, "value", None), str):
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
        # kernel[grid](...) launches a Triton kernel: its tensors come in the order of the op's schema
        launch = isinstance(node.func, ast.Subscript)
        if launch or callee(node) in SIZES | BY_SCHEMA | EQUAL_ARGUMENTS or excused(lines, node.lineno, "positional"):
            continue
        yield f"{named(path)}:{node.lineno} calls {ast.unparse(node.func)} with {len(node.args)} positional arguments"


def inner_imports(path: Path) -> Iterator[str]:
    source = path.read_text()
    lines = source.splitlines()
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        previous = 0
        for node in ast.walk(function):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                # one reason serves the imports that follow each other
                commented = lines[node.lineno - 2].lstrip().startswith("#")
                if not commented and node.lineno != previous + 1:
                    yield f"{named(path)}:{node.lineno} imports inside {function.name} without its reason above"
                previous = node.end_lineno


def sniffing(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and callee(node) == "hasattr":
            yield f"{named(path)}:{node.lineno} asks hasattr: purify_fast/protocols.py says what an object has"


def without_text(source: str) -> str:
    """C++ whose comments, strings and preprocessor lines are blanks; every line stays where it is."""

    def blank(match: re.Match) -> str:
        return re.sub(r"[^\n]", " ", match[0])

    source = re.sub(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])+\'', blank, source, flags=re.DOTALL)
    return re.sub(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", blank, source, flags=re.MULTILINE)


def cpp_functions(source: str) -> Iterator[tuple[int, int, str]]:
    """(first line, last line, what stands before the brace) of every function outside of functions."""
    text = without_text(source)
    # what every open brace holds: a scope (namespace, type), a function, or a part of one
    scopes: list[tuple[str, int, str]] = []
    start = 0
    for at, char in enumerate(text):
        if char not in "{};":
            continue
        if char == "{":
            head = text[start:at]
            inside = any(kind != "scope" for kind, _, _ in scopes)
            is_scope = re.search(r"\b(namespace|extern)\b", head) or (
                re.search(r"\b(struct|class|union|enum)\b", head) and not head.rstrip().endswith(")")
            )
            kind = "part" if inside else "scope" if is_scope else "function" if ")" in head else "part"
            begin = start + len(head) - len(head.lstrip())
            scopes.append((kind, text.count("\n", 0, begin) + 1, " ".join(head.split())))
        elif char == "}" and scopes:
            kind, first, head = scopes.pop()
            if kind == "function":
                yield first, text.count("\n", 0, at) + 1, head
        start = at + 1


def long_cpp_functions(path: Path) -> Iterator[str]:
    source = path.read_text()
    lines = source.splitlines()
    for first, last, head in cpp_functions(source):
        if last - first + 1 > LONGEST_FUNCTION and not excused(lines, first, "long"):
            yield f"{named(path)}:{first} {head[:60]} has {last - first + 1} lines"


CHECKS = {
    "long file": (long_file, [*PYTHON, *CPP]),
    "long function": (long_functions, PYTHON),
    "long C++ function": (long_cpp_functions, CPP),
    "positional call": (positional_calls, PYTHON),
    "inner import": (inner_imports, PYTHON),
    "hasattr": (sniffing, PYTHON),
}
ROOMS = sorted({room(path) for path in [*PYTHON, *CPP]})


def findings(name: str) -> list[str]:
    return [line for check, paths in CHECKS.values() for path in paths if room(path) == name for line in check(path)]


def private_words(name: str) -> list[str]:
    found = []
    for path in (path for path in PYTHON if room(path) == name):
        lines = enumerate(path.read_text().splitlines(), 1)
        found += [f"{named(path)}:{number} {line.strip()}" for number, line in lines if PRIVATE_WORDS.search(line)]
    return found


@pytest.mark.parametrize("name", ROOMS)
@pytest.mark.parametrize("check", [findings, private_words])
def test_structure(check, name):
    found = check(name)
    assert not found, "\n".join(["", *found])


def test_the_scanner_sees_functions_of_all_kinds():
    source = """
namespace a {
struct B {
  int f() const { return "}"[0]; }  // }
  int g[2]{1, 2};
};
template <class T>
PF_HD int h(T x) {
  if (x) {
    const auto y = [&](int i) { return i; };
  }
  return 0;
}
#define M(x) \\
  int m() {  \\
  }
Key k() { return Key{1, 2}; }
}
"""
    assert [(first, last) for first, last, _ in cpp_functions(source)] == [(4, 4), (7, 13), (17, 17)]
