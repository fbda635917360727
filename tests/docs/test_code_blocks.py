"""Every code block of README and the documentation runs, but shorter. Commands of this package run on some pages.

Commands of the other pages, and those of other programs, are read."""

import argparse
import contextlib
import importlib
import pkgutil
import re
import shlex
import sys
import tokenize
from pathlib import Path

import api_pages
import numpy as np
import pytest
import torch
from pictures import picture
from small_models import Halved, Linear, smaller, write_official
from torch import nn

import benchmarks.__main__ as benchmarks
import purify_fast
from benchmarks.pages import fill
from benchmarks.prose import WIDTH
from examples import your_diffusion_loop
from purify_fast import cli
from purify_fast.methods.atop import DeepFillGenerator
from purify_fast.methods.carso import RECIPES
from purify_fast.methods.recipes import all_recipes
from purify_fast.training.task import RunLength

ROOT = Path(__file__).parents[2]
BLOCKS = {
    page.relative_to(ROOT).as_posix(): re.findall(r"^```([\w{}:-]*)\n(.*?)^```", page.read_text(), re.S | re.M)
    for page in (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")))
}
#: What takes long is made short; the names and the shapes stay.
SHORTER = {
    r"^classifier = \.\.\..*$": "",
    r"steps=\d\d+": "steps=2",
    r"epochs=\d+": "epochs=1",
    r"eps=8 / 255, graphs=graphs\)": "eps=8 / 255, steps=2, graphs=graphs)",
    r"evaluate\(noisy, images, labels": "evaluate(noisy, images[:4], labels[:4]",
    r", batch_size=\d+|batch_size=\d+, ": "",
    r"FitConfig\(": "FitConfig(batch_size=8, ",
    r"digits\.x_train, digits\.y_train$": "digits.x_train[:160], digits.y_train[:160]",
    # the protocol "standard" takes minutes on such images; another test runs it
    r"^report = evaluate\(defence, x, y, eps=8 / 255\)": (
        "report = evaluate(defence, x, y, eps=8 / 255, attacks=[], progress=False)"
    ),
    r"eps=8 / 255, base=classifier\)": "eps=8 / 255, base=classifier, attacks=[], progress=False)",
    # the list of attacks of every kind runs on a model of one layer; a function is a row whatever it calls
    r"^evaluate\(defence, x\[:2\], y\[:2\], eps=0.2, steps=\d+, attacks=attacks\)$": (
        "evaluate(tiny, tiny_x, y[:2], eps=0.2, attacks=attacks, progress=False)"
    ),
    r"through=peel": "through=BpdaModel.of(tiny, 'mean')",
    r"through=defence\.classifier": "through=tiny.classifier",
    r"through=BpdaModel\.of\(defence\)": "through=BpdaModel.of(tiny)",
    # 5,000 queries of Square take half a minute
    r'version="standard", seed=0\)': 'version="custom", attacks=["apgd-ce"], seed=0)',
    # "strong" on a random purifier takes minutes
    r"evaluate\(vote, x, y, eps=0.1, protocol=.strong., ": (
        "evaluate(vote, x[:2], y[:2], eps=0.1, attacks=[PGD(steps=2)], "
    ),
}
#: Languages whose blocks are not run: what programs print, drawings, and files (py).
TEXT = ("text", "bibtex", "yaml", "json", "diff", "cpp", "py")


class Layers(nn.Module):
    """A classifier whose layers are called as torchvision calls a ResNet's, and as the package's small network does."""

    def __init__(self):
        super().__init__()
        self.layer1 = nn.Conv2d(3, 4, 3, stride=4, padding=1)
        self.layer3 = nn.Conv2d(4, 4, 3, stride=2, padding=1)
        self.layer4 = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = self.layer3(self.layer1(2 * x - 1).relu()).relu()
        return self.head(self.layer4(x).relu().mean((2, 3)))


#: Pages of which a reader can run every block as it stands, from the first to the last, after a plain installation.
NAMES = ("get_started", "judge", "import", "training", "command_line", "certify", "speed")
WHOLE = tuple(f"docs/{name}.md" for name in NAMES)
#: Options that make a command short. They stand at its end, where they win, if the words before it are in the command.
SHORT_COMMANDS = {
    "train": "--epochs 1 --steps-per-epoch 2 --batch-size 16",
    "train classifier": "--width 4",
    "train atop --recipe": "--width 8",
    "train --steps": "--steps 2 --alpha 0.3",
    "pets": "--size 16",
    "evaluate": "--images 4 --steps 2 --protocol fast --probes False --n-eval 1 --eot-iter 1",
    "certify": "--images 2 --draws 2000",
}
#: Packages that only the extras bring.
EXTRAS = ("sklearn", "matplotlib", "scipy", "pyautoattack", "autoattack", "torchattacks", "foolbox")


@pytest.fixture
def scope(tmp_path, monkeypatch):
    """What the blocks may take for granted: a classifier, images, labels, a loader, the weight files that are read."""
    monkeypatch.chdir(tmp_path)
    # compiling takes a minute, and is tested elsewhere
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    # a training that is made short may end within a delay
    monkeypatch.setattr(RunLength, "check_acts", lambda self, step, **_: step)
    made = smaller(RECIPES["cifar10"])
    monkeypatch.setitem(RECIPES, "cifar10", made)
    monkeypatch.setitem(all_recipes(), made.name, made)
    torch.manual_seed(0)
    write_official(made.defence(made.build_classifier()), tmp_path / "models", "wrn_28_10_cifar_10_cui_2023")
    torch.save({"G": DeepFillGenerator(5, 4).state_dict()}, "states_pt_places2.pth")
    x, y = torch.rand(16, 3, 32, 32), torch.arange(16) % 10
    # the folder of a reader's images, and the folder of data sets
    for number in range(48):
        for part in ("train", "test"):
            picture(tmp_path / "pets" / part / f"class {number % 3}" / f"{number}.png", number, (20, 24))
    images, labels = np.random.default_rng(0).integers(0, 256, (40, 28, 28), dtype=np.uint8), np.arange(40) % 10
    np.savez(tmp_path / "mnist.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    monkeypatch.setenv("PURIFY_FAST_DATA", str(tmp_path))
    return {
        "torch": torch,
        "purify_fast": purify_fast,
        "classifier": Layers().eval(),
        "classifier_256": Linear(3 * 256 * 256),
        "tiny": purify_fast.Atop(Linear(3 * 8 * 8), Halved(), (3, 8, 8)),
        "x": x,
        "y": y,
        "tiny_x": x[:2, :, :8, :8],
        "x_uint8": (255 * x).byte(),
        "loader": [(x[:8], y[:8]), (x[8:], y[8:])],
        # what the front page's readers bring
        **{name: Layers().eval() for name in ("defence", "model")},
        **{name: torch.rand(4, 8) for name in ("mean", "log_variance")},
        **{name: [torch.rand(4, 8), torch.rand(4, 2, 5, 5)] for name in ("features", "teacher_features")},
        **{"sample_ids": torch.arange(4), "seed": torch.zeros(1, dtype=torch.int64)},
        "sample_logits": torch.rand(4, 3, 10),
    }


def shortened(block):
    for long, short in SHORTER.items():
        block = re.sub(long, short, block, flags=re.MULTILINE)
    return block


def without_figures(text):
    return " ".join(re.sub(r"\d+(\.\d+)?", "#", text).split())


def short(words):
    """A command of this package with the options of `SHORT_COMMANDS`."""
    few = [options for part, options in SHORT_COMMANDS.items() if set(part.split()) <= set(words)]
    return [*words, *" ".join(few).split()]


def run_commands(block):
    """Run the commands of this package in a block, except one that would take minutes, and trainings of denoisers."""
    for words in commands(block):
        if words[0] == "purify-fast" and words[1] not in ("tune", "--tyro-write-completion"):
            assert cli.main(short(words[1:])) == 0, words
        if words[:3] == ["python", "examples/your_diffusion_loop.py", "--train"]:
            size = ["--size", "16", "16"] if "pets" in words else []
            your_diffusion_loop.main([*words[2:], "--epochs", "1", *size])


#: The pages with blocks that run, among them those that a new user reads first, and those that are not slow.
FIRST = ("README.md", *WHOLE)
QUICK = ("README.md", "docs/import.md")
RUN = [*FIRST, *(page for page, blocks in BLOCKS.items() if page not in FIRST and "python" in dict(blocks))]


@pytest.mark.parametrize("page", [pytest.param(page, marks=() if page in QUICK else pytest.mark.slow) for page in RUN])
def test_blocks_run_one_after_the_other(page, scope, capsys, monkeypatch, request):
    if page != "README.md":
        # the front page shows what the signs say
        request.getfixturevalue("short_signs")
    given = dict(scope)
    if page in WHOLE:
        scope.clear()
        for name in [*EXTRAS, *(name for name in sys.modules if name.partition(".")[0] in EXTRAS)]:
            monkeypatch.setitem(sys.modules, name, None)
    else:
        pytest.importorskip("pyautoattack")
    for number, (kind, block) in enumerate(BLOCKS[page]):
        if kind == "python":
            # the front page's blocks are for different readers, who bring their own classifier and images
            scope |= given if page == "README.md" else {}
            capsys.readouterr()
            exec(compile(shortened(block), f"{page}, block {number}", "exec"), scope)
        elif kind == "py" and page == "docs/judge.md":
            # the page says that the class of the block before stands above the function
            rounds = re.search(r"^class Rounds.*?\n\n\n", BLOCKS[page][0][1], re.S | re.M)[0]
            Path("my_defence.py").write_text(block.replace("def make", f"{rounds}def make"))
        elif kind == "" and page in FIRST:
            run_commands(block)
        elif kind == "text" and page == "README.md":
            # the front page shows what the block before prints; figures differ a little from processor to processor
            printed = without_figures(capsys.readouterr().out)
            assert all(without_figures(line) in printed for line in re.split(r"\n(?! )", block)), printed


def commands(block):
    """The command lines of a block, without comments and variables that are set before them."""
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=\S+", words[0]):
            words = words[1:]
        if words:
            yield words


COMMANDS = [
    (page, words)
    for page, blocks in BLOCKS.items()
    for kind, block in blocks
    if kind in ("", "bash", "console")
    for words in commands(block)
]
TARGETS = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=[" ".join(words[:3]) for _, words in COMMANDS])
def test_command_lines_are_read(page, words, monkeypatch, capsys):
    """The settings of a command are checked while it is read; none is run."""
    ran = []
    for command in cli._KINDS.values():
        monkeypatch.setattr(command, "run", lambda self: ran.append(self))
        # The folders of models do not exist here.
        monkeypatch.setattr(command, "writes", lambda self: None)
    match words:
        case ["purify-fast", *rest] | ["python", "-m", "purify_fast", *rest]:
            if rest[0].startswith("--tyro"):
                # test_the_shell_is_completed writes it
                return
            with pytest.raises(SystemExit, match="0") if rest[-1] == "--help" else contextlib.nullcontext():
                assert cli.main(rest) == 0, capsys.readouterr().err
            assert len(ran) == 1 or rest[-1] == "--help"
        case ["python", "-m", "benchmarks", *rest]:
            # the parser reads the line, and stops before anything runs
            monkeypatch.setattr(argparse.ArgumentParser, "parse_args", known_only)
            with pytest.raises(Read):
                benchmarks.main(rest)
        case ["make", *targets]:
            assert all(word in TARGETS or "=" in word for word in targets), targets
        case ["python" | "bash", path, *_] if path.startswith("examples/"):
            assert (ROOT / path).is_file()
        case ["pip", "install", *_] | ["python" | "python3", "-m", "pip" | "venv" | "pytest", *_] | ["pytest", *_]:
            for word in words:
                assert not word.startswith("tests") or (ROOT / word).exists(), word
        case [".ci/run"] | ["mkdir" | "git" | "cd" | "torchrun", *_]:
            pass
        case _:
            pytest.fail(f"{page} has a command that no test knows: {' '.join(words)}")


class Read(Exception):
    """A command line was accepted."""


def known_only(self, args=None, namespace=None):
    found, unknown = self.parse_known_args(args, namespace)
    assert not unknown, unknown
    raise Read(found)


def test_every_block_says_what_it_is():
    """A block is Python, commands, or text that nobody runs; another language would be left out in silence."""
    kinds = {(page, kind) for page, blocks in BLOCKS.items() for kind, _ in blocks}
    known = ("python", "", "bash", "console", *TEXT)
    assert not [pair for pair in kinds if pair[1] not in known and not pair[1].startswith("{")]
    assert len([kind for page, kind in kinds if kind == "python"]) >= 8 and len(COMMANDS) > 40


# -- numbers and links -------------------------------------------------------------------------------------------------
# README and docs say what the results files say, and their links lead somewhere.

RESULTS = ROOT / "benchmarks" / "results"


def test_pages_agree_with_the_results():
    found = fill.check(RESULTS)
    assert not found, "\n".join(found)


def test_tables_are_filled_and_a_block_without_an_end_deletes_no_text(tmp_path):
    page, block = tmp_path / "page.md", "<!-- table: {} -->\n{}<!-- end -->\n"
    page.write_text("A\n" + block.format("one", "old\n") + "B\n" + block.format("two", "kept\n"))
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "one.md").write_text("| a \\1 |\n\n")
    assert fill.fill(page, tmp_path) == ["two"]
    filled = "A\n" + block.format("one", "| a \\1 |\n") + "B\n" + block.format("two", "kept\n")
    assert page.read_text() == filled
    page.write_text(damaged := filled.replace("<!-- end -->", "<!-- ende -->", 1))
    with pytest.raises(ValueError, match="<!-- end -->"):
        fill.fill(page, tmp_path)
    assert page.read_text() == damaged


@pytest.mark.parametrize("page", fill.every_page(), ids=lambda page: page.name)
def test_no_line_of_prose_is_long(page):
    text = re.sub(r"```.*?```|<!--.*?-->", "", page.read_text(), flags=re.S)
    long = [line for line in text.split("\n") if len(line) > WIDTH and not re.match(r"\||!\[|\[!\[", line)]
    assert not long


def test_values_are_read_from_the_studies():
    names = ("carso_mnist/CARSO pipeline, z = 0/worst", "cifar10/AFT/clean")
    text = "keeps " + " % of ".join(f"<!-- value: {name} -->1.0<!-- end -->" for name in names)
    filled, missing = fill.filled(text, RESULTS)
    assert "-->78.6<!-- end -->" in filled and "-->60.2<!-- end -->" in filled and not missing
    with pytest.raises(ValueError, match=r"carso_mnist/CARSO pipeline/such attack .*report.json"):
        fill.filled("<!-- value: carso_mnist/CARSO pipeline/such attack --><!-- end -->", RESULTS)


def test_the_page_of_the_installation_lists_every_environment_variable():
    sources = [ROOT / "setup.py", *(ROOT / "purify_fast").rglob("*.py")]
    read = {name for path in sources for name in re.findall(r"\bPURIFY_FAST_[A-Z_]*[A-Z]\b", path.read_text())}
    listed = re.findall(r"^\| `(PURIFY_FAST_[A-Z_]+)", (ROOT / "docs" / "installation.md").read_text(), re.MULTILINE)
    assert read == set(listed) and listed == sorted(listed)


NAME = re.compile(r"(?<![\w./-])purify_fast(?:\.[A-Za-z_]\w*)+")
#: The library of the compiled kernels, which torch loads, is no module, and is absent in pure Python.
LIBRARY = "purify_fast._C"
#: Endings of file names, such as purify_fast.toml.
SUFFIXES = {"egg", "json", "log", "md", "py", "so", "toml", "yaml"}
PAGES = [*sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("*.md"))]
SOURCES = sorted((ROOT / "purify_fast").rglob("*.py"))


def exists(name):
    """Import the longest part that is a module, and read the other parts as attributes or fields of classes."""
    *path, last = name.split(".")
    try:
        pkgutil.resolve_name(name)
    except (ModuleNotFoundError, AttributeError):
        return len(path) > 1 and last in getattr(pkgutil.resolve_name(".".join(path)), "__annotations__", {})
    return True


def wrong_names(text):
    names = {name for name in NAME.findall(text) if name.rpartition(".")[2] not in SUFFIXES and name != LIBRARY}
    return sorted(name for name in names if not exists(name))


def text_of(path):
    """A page, or the comments and strings of a source."""
    if path.suffix == ".py":
        with tokenize.open(path) as file:
            kinds = tokenize.COMMENT, tokenize.STRING
            return "\n".join(token.string for token in tokenize.generate_tokens(file.readline) if token.type in kinds)
    return path.read_text()


@pytest.mark.parametrize("paths", [PAGES, SOURCES], ids=["pages", "sources"])
def test_every_name_exists(paths):
    wrong = {str(path.relative_to(ROOT)): names for path in paths if (names := wrong_names(text_of(path)))}
    assert not wrong


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("docs") / "api"
    api_pages.write(out)
    return out


def test_every_public_name_has_a_page(folder):
    found = api_pages.packages()
    assert {"purify_fast", "purify_fast.ops", "purify_fast.methods.carso", "purify_fast.protocols"} <= set(found)
    homes = api_pages.pages()
    for package, module in found.items():
        text = (folder / f"{package}.md").read_text()
        for name in api_pages.names(module):
            page = folder / f"{homes[f'{package}.{name}']}.md"
            assert page.is_file(), page
            assert f"[{name}]({page.name})" in text, (package, name)
    assert "](purify_fast.ops.md)" in (folder / "index.md").read_text()


def test_the_whole_package_lists_every_public_folder():
    root = Path(purify_fast.__file__).parent
    folders = {path.parent.name for path in root.glob("*/__init__.py")} - {"cli", "judge", "kernels"}
    assert folders <= set(purify_fast.__all__)
    assert all(importlib.import_module(name).__doc__ for name in api_pages.packages() if name.count(".") == 1)
