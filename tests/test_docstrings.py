"""Every parameter of every public function, and every field of every configuration, has an entry of its own."""

import ast
import dataclasses
import enum
import importlib
import inspect
import re
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path

import purify_fast

PACKAGE = Path(purify_fast.__file__).parent
FILES = sorted(path for path in PACKAGE.rglob("*.py") if "kernels" not in path.parts)


def entries(docstring: str | None) -> list[str] | None:
    """The names an "Args:" or "Attributes:" section has entries for, in order; None without such a section."""
    found: list[str] | None = None
    lines = inspect.cleandoc(docstring or "").splitlines()
    for at, line in enumerate(lines):
        if not re.fullmatch(r"(Args|Attributes):", line.strip()):
            continue
        indent = len(line) - len(line.lstrip())
        body = []
        for later in lines[at + 1 :]:
            if later.strip() and len(later) - len(later.lstrip()) <= indent:
                break
            body.append(later)
        heads = [head for head in textwrap.dedent("\n".join(body)).splitlines() if head and not head[0].isspace()]
        # the text before the first colon: "x" or "x (Tensor)"; several names in it are no name
        found = [*(found or []), *(re.sub(r" \(.*\)$", "", head.partition(":")[0]).lstrip("*") for head in heads)]
    return found


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    a = node.args
    every = [*a.posonlyargs, *a.args, *([a.vararg] if a.vararg else []), *a.kwonlyargs, *([a.kwarg] if a.kwarg else [])]
    return [x.arg for x in every if x.arg not in ("self", "cls")]


def written(path: Path) -> Iterator[str]:
    """Functions whose docstring has an "Args:" section without exactly one entry for each parameter."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found = entries(ast.get_docstring(node))
            if found is not None and sorted(found) != sorted(parameters(node)):
                yield f"{path.name}:{node.lineno} {node.name} has entries for {found}, parameters {parameters(node)}"


def exported(path: Path) -> Iterator[tuple[str, object]]:
    """The objects that the module's ``__all__`` names and the package defines."""
    relative = path.relative_to(PACKAGE.parent).with_suffix("")
    if relative.name == "__main__":
        return
    module = importlib.import_module(".".join(relative.parts).removesuffix(".__init__"))
    for name in getattr(module, "__all__", ()):
        value = getattr(module, name)
        if isinstance(value, (type, types.FunctionType)) and value.__module__.startswith("purify_fast"):
            yield f"{module.__name__}.{name}", value


def undocumented(value) -> list[str]:
    """The parameters of a public function or class that have no entry."""
    if isinstance(value, type):
        if issubclass(value, (enum.Enum, BaseException)) or getattr(value, "_is_protocol", False):
            return []
        family = [kind for kind in value.__mro__ if kind.__module__.startswith("purify_fast")]
        texts = [kind.__doc__ for kind in family] + [
            vars(k)["__init__"].__doc__ for k in family if "__init__" in vars(k)
        ]
        if dataclasses.is_dataclass(value):
            wanted = [field.name for field in dataclasses.fields(value) if field.init and field.name[0] != "_"]
        elif any("__init__" in vars(kind) for kind in family):
            wanted = list(inspect.signature(value).parameters)
        else:
            wanted = []
    else:
        texts, wanted = [value.__doc__], list(inspect.signature(value).parameters)
    found = [name for text in texts for name in entries(text) or ()]
    return [name for name in wanted if name not in found]


def test_every_parameter_has_an_entry():
    found = [line for path in FILES for line in written(path)]
    public = dict(pair for path in FILES for pair in exported(path))
    found += [f"{name}: {', '.join(names)}" for name, value in public.items() if (names := undocumented(value))]
    assert not found, "\n".join(["one entry for each parameter:", *found])
