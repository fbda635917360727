"""Make and check what a tag publishes. The jobs of `.github/workflows/release.yml` are these commands.

`python .ci/release.py COMMAND` has the commands:

version TAG                  compare a tag with the version, and with the first heading of CHANGELOG.md
prepare OWNER/NAME           write the address of the repository into the files of this checkout that are packed
notes OWNER/NAME             print what CHANGELOG.md says of this version, with links that lead somewhere on other pages
weights FOLDER               copy the weights of the zoo's models into a folder, under the names that are downloaded
check FILE...                check wheels and source distributions: metadata, links of the description, `twine check`
rehearse [--kernels] FOLDER  do all of this in a copy of the checkout, install the files, and use them; upload nothing
"""

from __future__ import annotations

import html.parser
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from email.message import Message
from email.parser import HeaderParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: What the sources say in place of the owner and the name of the repository.
PLACEHOLDER = "ADDRESS"
#: The files that contain the address, and the sentence of README that explains it.
ADDRESSED = ("README.md", "pyproject.toml", "docs/installation.md")
EXPLANATION = " ADDRESS is the owner and the name of this repository."
#: Code, which stays as it is; or a link or a picture of Markdown: `!` of a picture, the text, and the target.
LINK = re.compile(r"```.*?```|`(?:[^`\n]|\n(?!\n))+`|(!?)\[([^\]]*)\]\(([^)\s]+)\)", re.S)
#: The labels that people look for beside the description.
LABELS = {"Repository", "Documentation", "Changelog", "Issues"}


def version_of(root: Path) -> str:
    (found,) = re.findall(r'^version = "(.+)"$', (root / "pyproject.toml").read_text(encoding="utf-8"), re.M)
    return str(found)


def sections(root: Path) -> list[tuple[str, str]]:
    """The headings of the second level in CHANGELOG.md, as words before the first space, and their texts."""
    _, *parts = re.split(r"^## ", (root / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.M)
    return [(part.split(maxsplit=1)[0], part.partition("\n")[2].strip() + "\n") for part in parts]


def check_version(root: Path, tag: str) -> None:
    version, (newest, _) = version_of(root), sections(root)[0]
    if tag != f"v{version}":
        sys.exit(f"the tag must be v{version}, the version in pyproject.toml, got {tag}")
    if newest != version:
        sys.exit(f"the first heading of CHANGELOG.md must be {version}, the version in pyproject.toml, got {newest}")


def whole_links(text: str, root: Path, repository: str) -> str:
    """Replace the relative links of a page at the root by addresses of the tag's files on GitHub."""
    tag = f"v{version_of(root)}"

    def whole(found: re.Match[str]) -> str:
        picture, name, target = found.groups()
        if target is None or re.match(r"https?:|#", target):
            return found[0]
        path = target.partition("#")[0]
        if not (root / path).exists():
            sys.exit(f"a link leads to {target}, which is no file of the repository")
        if picture:
            return f"![{name}](https://raw.githubusercontent.com/{repository}/{tag}/{target})"
        kind = "tree" if (root / path).is_dir() else "blob"
        return f"[{name}](https://github.com/{repository}/{kind}/{tag}/{target})"

    return LINK.sub(whole, text)


def prepare(root: Path, repository: str) -> None:
    """Make a checkout that of a release: with the address of the repository, and a README for other pages."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        sys.exit(f"the repository must be OWNER/NAME, got {repository}")
    for name in ADDRESSED:
        text = (root / name).read_text(encoding="utf-8").replace(EXPLANATION, "")
        text = text.replace(f"github.com/{PLACEHOLDER}", f"github.com/{repository}")
        if PLACEHOLDER in text:
            sys.exit(f"{name} contains {PLACEHOLDER} in another place than the address of the repository")
        (root / name).write_text(whole_links(text, root, repository) if name == "README.md" else text, encoding="utf-8")


def notes(root: Path, repository: str) -> str:
    """Return the section of the changelog about the version of a checkout."""
    newest, text = sections(root)[0]
    check_version(root, f"v{newest}")
    return whole_links(text, root, repository)


def copy_weights(root: Path, folder: Path) -> None:
    """Copy the weights of all models of the zoo. `purify_fast/zoo/__init__.py` downloads files of these names."""
    for path in sorted(root.glob("purify_fast/zoo/models/*/model.safetensors")):
        shutil.copy(path, folder / f"{path.parent.name}.safetensors")


# -- what was built ----------------------------------------------------------------------------------------------------


def metadata(file: Path) -> Message:
    """The metadata of a wheel or of a source distribution, whose payload is the description."""
    if file.suffix == ".whl":
        with zipfile.ZipFile(file) as archive:
            (name,) = (name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
            text = archive.read(name)
    else:
        with tarfile.open(file) as archive:
            (name,) = (name for name in archive.getnames() if re.fullmatch(r"[^/]+/PKG-INFO", name))
            member = archive.extractfile(name)
            assert member is not None
            text = member.read()
    return HeaderParser().parsestr(text.decode())


class Targets(html.parser.HTMLParser):
    """Collects the targets of links and pictures."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attributes if name in ("href", "src") and value is not None]


def check(files: list[Path]) -> None:
    """End with a message if a file must not be published."""
    from readme_renderer import markdown

    for file in files:
        told = metadata(file)
        text = told.as_string()
        labels = {line.partition(",")[0] for line in told.get_all("Project-URL", ())}
        if PLACEHOLDER in text:
            sys.exit(
                f"the metadata of {file.name} contain {PLACEHOLDER}: run `python .ci/release.py prepare OWNER/NAME`"
            )
        if not labels >= LABELS:
            sys.exit(f"the metadata of {file.name} must have the addresses {sorted(LABELS)}, got {sorted(labels)}")
        page = markdown.render(told.get_payload())
        if page is None:
            sys.exit(f"the description of {file.name} cannot be rendered")
        relative = [target for target in Targets(page).found if not target.startswith(("https://", "#"))]
        if relative:
            sys.exit(f"the description of {file.name} has relative links: {', '.join(relative)}")
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *files], check=True)


# -- a rehearsal -------------------------------------------------------------------------------------------------------


def copied(root: Path, folder: Path) -> Path:
    """Copy the files that git knows or would add, and close the changelog, as the commit of a release does."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=root, capture_output=True, text=True, check=True).stdout.split("\0")[:-1]
    for name in names:
        if (root / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / name, folder / name)
    changes = folder / "CHANGELOG.md"
    closed = changes.read_text(encoding="utf-8").replace("## Unreleased\n", f"## {version_of(root)}\n", 1)
    changes.write_text(closed, encoding="utf-8")
    return folder


def built(tree: Path, dist: Path, *, kernels: bool) -> tuple[Path, Path]:
    """Build the source distribution of a tree, and a wheel from the source distribution, as `build` does."""
    # ninja, which compiles several files at once, is beside this Python.
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environ = os.environ | {"PURIFY_FAST_BUILD": "cpu" if kernels else "none", "PATH": programs}
    # The build must not look for its requirements elsewhere: those of the kernels are here.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(dist), str(tree)]
    subprocess.run(command, env=environ, check=True)
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    return wheel, sdist


def code_under(page: str, heading: str) -> str:
    """The first block of Python under a heading of README."""
    found = re.search(rf"^## {re.escape(heading)}\n.*?^```python\n(.*?)^```", page, re.S | re.M)
    assert found, f"README.md has no block of Python under {heading}"
    return found[1]


#: What a reader of README's block on faster models brings: a classifier, a batch of images, and their labels.
BROUGHT = """\
import torch
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(7200, 10))
x, y = torch.rand(4, 3, 32, 32), torch.arange(4)
"""
#: What must be true of an installation: it is the installed package, and it has the kernels if they were built.
LOOK = """\
import purify_fast
from purify_fast import _library
assert "site-packages" in purify_fast.__file__, purify_fast.__file__
assert _library.loaded() == {kernels}, _library.load_error
"""


def use(file: Path, folder: Path, *, kernels: bool, compiler: bool, say: Callable[[str], object] = print) -> None:
    """Install a file into an empty environment, and run README's judgements and its block on faster models there.

    The environment has links to the installed requirements of the package, so that nothing large is downloaded.

    Args:
        file: a wheel or a source distribution.
        folder: a new folder for the environment, and for what is written in it.
        kernels: whether the installed package must have compiled kernels.
        compiler: whether the environment finds the programs of this machine. Without them, it has no compiler.
        say: function that gets a line for each step.
    """
    # The other commands need no package, so they run with the Python of any machine.
    import first_commands

    folder.mkdir()
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    (folder / "site").mkdir()
    (packages,) = (folder / "venv").glob("lib/python*/site-packages")
    # A build in isolation does not see these packages, as it sees none of an environment. PYTHONPATH would show them.
    (packages / "requirements.pth").write_text(f"{folder / 'site'}\n")
    first_commands.link(
        [name for name in first_commands.required("purify-fast") if name != "purify-fast"], folder / "site"
    )
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith("PURIFY_FAST_") and k not in ("CC", "CXX", "PYTHONPATH")
    }
    programs = os.pathsep.join(
        [str(folder / "venv/bin"), os.environ["PATH"]] if compiler else [str(folder / "venv/bin")]
    )
    environ = kept | {
        "PATH": programs,
        "PURIFY_FAST_CACHE": str(folder / "cache"),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    python = str(folder / "venv/bin/python")
    judged = code_under(page, "Judge the robustness of a defence")
    faster = BROUGHT + code_under(page, "Make your own model and training loop faster")
    steps = {
        f"pip install {file.name}": [python, "-m", "pip", "install", "--quiet", str(file)],
        "import": [python, "-c", LOOK.format(kernels=kernels)],
        "README: the commands": ["/bin/sh", "-ec", first_commands.block(page, "judge")],
        "README: judge": [python, "-c", judged],
        "README: make your own model faster": [python, "-c", faster],
    }
    for name, command in steps.items():
        done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{file.name} in an empty environment: {name} failed:\n{done.stdout}{done.stderr}")
        say(f"{file.name}: {name}")


def rehearse(folder: Path, *, kernels: bool) -> None:
    tree, dist = copied(ROOT, folder / "tree"), folder / "dist"
    check_version(tree, f"v{version_of(tree)}")
    (dist / "weights").mkdir(parents=True)
    (dist / "notes.md").write_text(notes(tree, "example/purify_fast"), encoding="utf-8")
    copy_weights(tree, dist / "weights")
    prepare(tree, "example/purify_fast")
    wheel, sdist = built(tree, dist, kernels=kernels)
    check([wheel, sdist])
    use(wheel, folder / "wheel", kernels=kernels, compiler=kernels)
    # In isolation, a build finds no torch, and so builds no kernels.
    use(sdist, folder / "sdist", kernels=False, compiler=kernels)


def main(command: str, *given: str) -> None:
    match command, given:
        case "version", [tag]:
            check_version(ROOT, tag)
        case "prepare", [repository]:
            prepare(ROOT, repository)
        case "notes", [repository]:
            print(notes(ROOT, repository), end="")
        case "weights", [folder]:
            copy_weights(ROOT, Path(folder))
        case "check", [_, *_]:
            check([Path(file) for file in given])
        case "rehearse", [*options, folder] if options in ([], ["--kernels"]):
            rehearse(Path(folder).resolve(), kernels=bool(options))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(*(sys.argv[1:] or [""]))
