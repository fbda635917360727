"""Base classes of the commands. A command's fields are its options."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import shutil
import sys
import textwrap
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import tyro
import yaml
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from .._files import usable_device, write_text
from .._validation import check_types
from .._version import __version__

if TYPE_CHECKING:
    from typing_extensions import Self

    from ..data import DataSet


@dataclass(frozen=True)
class Command(ABC):
    """A command, whose fields are its options.

    Args:
        config: The run.yaml of an earlier run, which sets this command's defaults. Options win over the file.
    """

    #: The name of the command, such as ``train carso``.
    called: ClassVar[str]
    #: The words of a command line after the command's name, which the help shows.
    example: ClassVar[str] = ""
    #: All commands by their names.
    kinds: ClassVar[dict[str, type[Command]]] = {}
    #: The options that have no effect "without" or "beside" another option. The tables of base classes hold too.
    no_effect: ClassVar[dict[tuple[str, str], tuple[str, ...]]] = {}
    #: The words that the user has typed after the program's name.
    typed: ClassVar[tuple[str, ...]] = ()

    config: Path | None = None

    def __init_subclass__(cls) -> None:
        if "called" in vars(cls):
            Command.kinds[cls.called] = cls

    def __post_init__(self) -> None:
        check_types(self)

    @classmethod
    def of_recipe(cls, name: str | None, official_code: bool, batch_size: int | None = None) -> Self:
        """Make this command with the settings of a recipe, if the command has the option --recipe, or its own."""
        return cls()

    @abstractmethod
    def run(self) -> int | None:
        """Run the command, and return the exit status; None means 0."""

    def writes(self) -> Path | None:
        """The folder that the command writes to and that is locked during the run; None if there is none."""
        return getattr(self, "out", None)


@dataclass(frozen=True)
class DataCommand(Command):
    """A command that reads images.

    Args:
        data: Data set: digits, mnist, fashion_mnist, cifar10, cifar100, svhn, tiny_imagenet; or an .npz file with
            x_train, y_train, x_test and y_test; or a folder with train/<class>/*.jpg|png, and test/ or val/ (test/ if
            there are both).
        data_root: Folder of the data sets, also for downloads. Default: the variable PURIFY_FAST_DATA, or the current
            folder.
        download: Let torchvision download the official files of a data set if they are missing.
        size: Height and width to which images are resized and cropped before any attack. A single number sets both.
        num_classes: Number of classes, if some labels do not occur in the data. Default: the largest label plus 1.
        stream: Keep the training images in main memory, or in their file, to save memory of the GPU.
        cache: Folder for the decoded images of an image folder. Default: .purify_fast in the image folder.
        device: Device to compute on: cpu, cuda, or another device of PyTorch. auto: a GPU if there is any.
    """

    data: str = "digits"
    data_root: Path | None = field(
        default_factory=lambda: Path(root).expanduser() if (root := os.environ.get("PURIFY_FAST_DATA")) else None
    )
    download: bool = False
    size: tuple[int, ...] | None = None
    num_classes: int | None = None
    stream: bool = False
    cache: Path | None = None
    device: str = "auto"

    def load_data(self, train: bool = True) -> DataSet:
        """Load the images to the device, without training images unless ``train`` is True."""
        from .._process import processes
        from ..data import load_dataset

        device = usable_device(self.device)
        size: Any = self.size * 2 if self.size is not None and len(self.size) == 1 else self.size
        options: Any = {"image_size": size, "train": train, "download": self.download, "cache": self.cache}
        loaded = load_dataset(self.data, self.data_root, self.num_classes, **options)
        if processes()[0] == 0:
            print(f"{counted(loaded)}; on {device}", file=sys.stderr)
        moved = loaded.to(device)
        return replace(moved, x_train=loaded.x_train) if self.stream else moved


def counted(loaded: DataSet) -> str:
    """A line on the numbers of images, by class if the classes have names and are few."""
    parts = []
    for labels, what in ((loaded.y_train, "training"), (loaded.y_test, "held-out")):
        sizes = labels.cpu().bincount(minlength=loaded.num_classes).tolist()
        named = ", ".join(f"{name} {size:,}" for name, size in zip(loaded.classes or (), sizes, strict=False))
        by_class = f" ({named})" if named and len(sizes) <= 12 else ""
        if len(labels):
            parts.append(f"{len(labels):,} {what} images{by_class}")
    # The name of a folder ends with that of its held-out part.
    return f"{loaded.name.partition('/')[0]}: {', '.join(parts)}"


# -- makes a command from the words of a command line, with tyro, and reads and writes ``run.yaml`` --------------------

OfCommand = TypeVar("OfCommand", bound=Command)

RUN_FILE = "run.yaml"
#: The folder of a run's evaluation, in the folder of the run.
EVALUATION = "evaluation"


def number(text: str) -> float:
    """Convert a number in a text, or a fraction such as ``8/255``, to a float. Other texts raise a ValueError."""
    numerator, slash, denominator = text.partition("/")
    try:
        return float(numerator) / float(denominator) if slash else float(text)
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"must be a number or a fraction such as 8/255, got {text!r}") from error


def values(command: Any) -> dict[str, Any]:
    """The options of a command and of its configurations, as values for YAML: texts, numbers and lists."""
    options: dict[str, Any] = {}
    for item in dataclasses.fields(command):
        value = getattr(command, item.name)
        if dataclasses.is_dataclass(value):
            options |= values(value)
        elif item.name != "config":
            value = str(value) if isinstance(value, Path) else value
            options[item.name] = list(value) if isinstance(value, tuple) else value
    return options


def flag(name: str) -> str:
    """The option on the command line for the name of a field."""
    return f"--{name.replace('_', '-')}"


def write_run_file(command: Command, folder: Path) -> None:
    """Write ``run.yaml`` to the folder of a run."""
    facts = {"command": command.called, "version": __version__}
    head = f"# purify-fast {command.called} --config {RUN_FILE} repeats this run. Options on the command line win.\n"
    text = yaml.safe_dump(facts | values(command), sort_keys=False, allow_unicode=True)
    write_text(folder / RUN_FILE, head + text)


def run_of(folder: Path) -> dict[str, Any]:
    """The options of the training in a folder; empty without a run.yaml."""
    return read_run_file(folder / RUN_FILE) if (folder / RUN_FILE).is_file() else {}


def size_of_run(folder: Path) -> tuple[int, ...] | None:
    """The height and the width to which a training resized its images; None if it did not, or without a run.yaml."""
    size = run_of(folder).get("size") or ()
    return tuple(size * 2 if len(size) == 1 else size) or None


def read_run_file(path: Path) -> dict[str, Any]:
    """Read a table of options from a YAML file. Raises a ValueError if the file contains no table."""
    try:
        table = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(table, dict):
        raise ValueError(f"{path} must contain a table of options, with lines such as `eps: 0.3`")
    return table


def options_of(path: Path, kind: type[Command]) -> dict[str, Any]:
    """Read the options of a command from a file."""
    options = {str(key).replace("-", "_"): value for key, value in read_run_file(path).items()}
    options.pop("version", None)
    if (command := options.pop("command", kind.called)) != kind.called:
        raise ValueError(f"--config {path} is a file of `{command}`, not of `{kind.called}`")
    if unknown := options.keys() - values(kind()).keys():
        raise ValueError(f"--config {path} has options that `{kind.called}` has not: {', '.join(sorted(unknown))}")
    return options


def words_of(options: dict[str, Any], kind: type[Command]) -> list[str]:
    """Write options as the words of a command line, in which a shell would replace ``~`` by the home folder."""
    defaults, words = values(kind()), list[str]()
    for name, value in options.items():
        if isinstance(value, bool) and isinstance(defaults.get(name), bool):
            words.append(flag(name if value else f"no_{name}"))
        else:
            words += [flag(name), *(expanduser(str(word)) for word in (value if isinstance(value, list) else [value]))]
    return words


# -- the command line --------------------------------------------------------------------------------------------------

#: The rules of this module, for ``tyro.cli(registry=...)``.
OPTION_TYPES = ConstructorRegistry()


@OPTION_TYPES.primitive_rule
def _fractions(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    if info.type is not float:
        return None
    rules: dict[str, Any] = {"instance_from_str": lambda words: number(words[0])}
    rules["is_instance"] = lambda value: isinstance(value, (int, float)) and not isinstance(value, bool)
    return PrimitiveConstructorSpec(1, "FLOAT", str_from_instance=lambda value: [str(value)], **rules)


#: The address of the pages.
PAGES = "https://purify-fast.readthedocs.io"


def cli(kind: Any, arguments: list[str], example: str = "", **options: Any) -> Any:
    """Call ``tyro.cli`` with the rules of this module, for the class of a command or a union of classes.

    The help ends with an example, the words after the program's name.

    Raises:
        ValueError: an option is unknown, or its value is not allowed.
        SystemExit: the help was printed.
    """
    markers, printed = (tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes), io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            return tyro.cli(kind, args=arguments, config=markers, registry=OPTION_TYPES, **options)
    except SystemExit as end:
        # The texts of the options say what happens without them. Several whole numbers are written as INT ...
        text = re.sub(r"\s+\(default:\s*(None)?\)", "", printed.getvalue())
        text = re.sub(r"\{?\[(\w+) \[\w+ \.\.\.\]\]\}?", lambda match: f"{match[1]} ...".ljust(len(match[0])), text)
        text = re.sub(r"\{None\}\|(\w+( \.\.\.)?)", lambda match: match[1].ljust(len(match[0])), text)
        if end.code:
            # The parts between lines of dashes are a title, the error, and what is near.
            parts = [" ".join(part.split()) for part in re.split(r"^ *-{9,} *$", text, flags=re.M)]
            error = parts[min(1, len(parts) - 1)]
            error = re.sub(r"^Error parsing (?:(--\S+):|\S+:) ", lambda match: f"{match[1] or ''} ".lstrip(), error)
            error = error.replace("invalid literal for int() with base 10:", "must be a whole number, got")
            optional = re.search(
                r"no type matching (.*?) +could be instantiated from (.*?)\. Got (.*: (must be .*)|)", error
            )
            if optional:
                error = error[: optional.start()] + (optional[4] or f"must be {optional[1]}, got {optional[2]}")
            near = re.search(r"Perhaps you meant: (--\S+)", " ".join(parts[2:]))
            raise ValueError(f"{error}{f'; is {near[1]} meant?' if near else ''}") from None
        for line in [*text.splitlines(), *([f"Example: purify-fast {example}", f"Pages: {PAGES}"] if example else [])]:
            # The lines of a block of options have their width.
            print(line.rstrip() if line[:1] == " " else textwrap.fill(line, shutil.get_terminal_size().columns))
        raise


@dataclasses.dataclass(frozen=True)
class _Early:
    """The options that decide the defaults of other options."""

    config: Path | None = None
    recipe: str | None = None
    batch_size: int | None = None
    official_code: bool = False


def parse(kind: type[OfCommand], arguments: list[str], most: int | None = None) -> OfCommand:
    """Make a command of a class from the words after the command's name.

    ``most``: the largest number of images per step of a training, if the words do not set this number.
    """
    how: Any = {"prog": f"purify-fast {kind.called}", "example": f"{kind.called} {kind.example}"}
    early, _ = cli(_Early, arguments, return_unknown_args=True, add_help=False, **how)
    options = {} if early.config is None else options_of(early.config, kind)
    # The folder is not an option, but an argument without a name, of which there can be only one.
    folder = {"folder": Path(options.pop("folder")).expanduser()} if "folder" in options else {}
    # Of two equal options the last wins, so the command line wins over the file, and both win over a recipe.
    words = [*words_of(options, kind), *arguments]
    early, _ = cli(_Early, words, return_unknown_args=True, add_help=False, **how)
    # The configuration refuses a batch size below 1.
    size = max(0, early.batch_size or 0) or None
    default = kind.of_recipe(early.recipe, early.official_code, size)
    if most is not None and size is None and default.loop.batch_size > most:  # type: ignore[attr-defined]
        return parse(kind, [*arguments, "--batch-size", str(most)])
    command: OfCommand = cli(kind, words, default=dataclasses.replace(default, **folder), **how)
    chosen, usual = values(command), values(default)
    for (word, option), names in (item for base in kind.__mro__ for item in vars(base).get("no_effect", {}).items()):
        for name in names:
            if bool(chosen[option]) == (word == "beside") and chosen[name] != usual[name]:
                raise ValueError(f"{flag(name)} has no effect {word} {flag(option)}, got {chosen[name]}")
    return command
