"""The pages of the API reference: one for each public package, and one for each public name.

A name is public when the ``__all__`` of a package lists it. A name that several packages list has its page under the
most specific one, and the others link to it.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from types import ModuleType

import purify_fast

#: Modules without ``__all__`` that people are told to use: everything that they define is public.
MODULES = ("purify_fast.protocols", "purify_fast.speed.precision")
ROOT = Path(__file__).parents[1]
#: Tables of the results that pages lead to: those of every measured device.
RESULTS = tuple(
    path.relative_to(ROOT).with_suffix("").as_posix()
    for name in ("*/ops", "*/pipelines", "studies/*")
    for path in sorted(ROOT.glob(f"benchmarks/results/{name}.md"))
)
#: Files at the root of the repository that are pages of the site too.
PROJECT = ("CONTRIBUTING", "CHANGELOG", "SECURITY", "CODE_OF_CONDUCT")


def packages() -> dict[str, ModuleType]:
    """The public packages and modules by name, the whole package first."""
    found = {"purify_fast": purify_fast}
    for module in pkgutil.walk_packages(purify_fast.__path__, "purify_fast."):
        parts = module.name.split(".")
        if "kernels" in parts or any(part.startswith("_") for part in parts):
            continue
        if module.name in MODULES or (module.ispkg and hasattr(importlib.import_module(module.name), "__all__")):
            found[module.name] = importlib.import_module(module.name)
    return found


def names(module: ModuleType) -> list[str]:
    """The public names of a package.

    Args:
        module: one of `packages`.
    """
    if hasattr(module, "__all__"):
        return sorted(module.__all__, key=str.lower)
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    return sorted((name for name in own if not name.startswith("_")), key=str.lower)


def pages() -> dict[str, str]:
    """For every public name, ``package.name``, the name under which it has its page."""
    public = {
        f"{package}.{name}": getattr(module, name) for package, module in packages().items() for name in names(module)
    }
    homes: dict[int, str] = {}
    # the most specific package first: purify_fast.methods.carso.Carso before purify_fast.Carso
    for path in sorted(public, key=lambda path: (-path.count("."), path)):
        if not inspect.ismodule(public[path]):
            homes.setdefault(id(public[path]), path)
    return {
        path: value.__name__ if inspect.ismodule(value) else homes[id(value)] for path, value in sorted(public.items())
    }


def first_sentence(value: object) -> str:
    """What a name is for, in the words of its docstring.

    Args:
        value: a function, a class or data.
    """
    text = " ".join((inspect.getdoc(value) or "").split("\n\n")[0].split())
    return text.replace("|", "\\|").replace("``", "`")


def data_comment(path: str) -> str:
    """What the comment ``#:`` above a module's constant says.

    Args:
        path: the package and the name.
    """
    package, _, name = path.rpartition(".")
    pattern = re.compile(rf"((?:^#:.*\n)+)^{name}\b.*=", re.M)
    for source in sorted(Path(importlib.import_module(package).__file__).parent.rglob("*.py")):
        if found := pattern.search(source.read_text()):
            return " ".join(line.removeprefix("#:").strip() for line in found[1].splitlines())
    return ""


def name_page(path: str, value: object, aliases: list[str]) -> str:
    """The page of one name.

    Args:
        path: the package and the name.
        value: what it is.
        aliases: other names of it.
    """
    # an orphan: a tree of every name at the side of every page would be long to read and to build
    lines = ["---", "orphan: true", "---", "", f"# {path.rsplit('.', 1)[1]}", ""]
    lines += [f"In [{path.rsplit('.', 1)[0]}]({path.rsplit('.', 1)[0]}.md).", ""]
    if aliases:
        lines += ["Also " + ", ".join(f"`{alias}`" for alias in aliases) + ".", ""]
    if inspect.isclass(value):
        lines += ["```{eval-rst}", f".. autoclass:: {path}", "   :members:", "   :show-inheritance:", "```"]
    elif inspect.isroutine(value):
        lines += ["```{eval-rst}", f".. autofunction:: {path}", "```"]
    else:
        lines += ["```{eval-rst}", f".. py:data:: {path}", f"   :type: {type(value).__name__}", "```", ""]
        lines += [data_comment(path), ""]
        lines += ["Its keys: " + ", ".join(f"`{key}`" for key in value) + "."] if isinstance(value, dict) else []
    return "\n".join([*lines, ""])


def package_page(package: str, module: ModuleType, homes: dict[str, str]) -> str:
    """The page of one package: what it is for, and its names.

    Args:
        package: its name.
        module: the package.
        homes: as from `pages`.
    """
    text = (inspect.getdoc(module) or "").replace("``", "`")
    lines = [f"# {package}", "", text, "", "| name | |", "|---|---|"]
    for name in names(module):
        value = getattr(module, name)
        is_data = not (inspect.isroutine(value) or inspect.isclass(value) or inspect.ismodule(value))
        text = data_comment(homes[f"{package}.{name}"]) if is_data else first_sentence(value)
        lines.append(f"| [{name}]({homes[f'{package}.{name}']}.md) | {text} |")
    return "\n".join([*lines, ""])


def write(folder: Path) -> None:
    """All pages, in place of those that were there.

    Args:
        folder: ``docs/api``; it holds nothing else.
    """
    texts = {}
    found, homes = packages(), pages()
    for path, home in homes.items():
        if path == home:
            package, _, name = path.rpartition(".")
            aliases = [other for other, at in homes.items() if at == home and other != path]
            texts[path] = name_page(path, getattr(found[package], name), aliases)
    for package, module in found.items():
        texts[package] = package_page(package, module, homes)
    lines = [f"| [{package}]({package}.md) | {first_sentence(module)} |" for package, module in found.items()]
    head = ["# API reference", "", "Every public name has a page of its own, made from its docstring.", ""]
    texts["index"] = "\n".join(
        [*head, "| package | |", "|---|---|", *lines, "", "```{toctree}", ":hidden:", "", *found, "```", ""]
    )
    put(folder, texts)


def page_of(file: str) -> str:
    """The name of the page of a file in RESULTS or PROJECT: several devices have files of the same name.

    Args:
        file: path in the repository, without ``.md``.
    """
    return file.removeprefix("benchmarks/results/").replace("/", "-").lower()


def write_project(folder: Path) -> None:
    """Pages of files that have their place elsewhere: the tables of all measured rows, and the project's own files.

    Args:
        folder: ``docs/generated``; it holds nothing else.
    """
    root = folder.parents[1]
    texts = {}
    for name in RESULTS:
        rows = (root / f"{name}.md").read_text()
        texts[page_of(name)] = f"---\norphan: true\n---\n\n{rows}"
    for name in PROJECT:
        text = (root / f"{name}.md").read_text()
        for other in PROJECT:
            text = text.replace(f"]({other}.md", f"]({other.lower()}.md")
        texts[page_of(name)] = text.replace("](docs/", "](../")
    put(folder, texts)


def put(folder: Path, texts: dict[str, str]) -> None:
    """Write pages in place of those that were there.

    Args:
        folder: where.
        texts: of each page, by its name.
    """
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.md"):
        if old.stem not in texts:
            old.unlink()
    for name, text in texts.items():
        page = folder / f"{name}.md"
        # an unchanged page is not built again
        if not page.is_file() or page.read_text() != text:
            page.write_text(text)
