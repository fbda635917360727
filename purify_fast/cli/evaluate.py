"""The command ``purify-fast evaluate``, which writes a report, and ``check``, which tests its attacked images again."""

from __future__ import annotations

import json
import os
import re
import shlex
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, make_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import tyro

from .._files import REPORT, usable_device, what_is
from .._validation import Count, Norm, Precision, read_norm
from ..judge.request.config import EvaluateConfig
from ..methods import all_methods
from .command import (
    EVALUATION,
    RUN_FILE,
    Command,
    DataCommand,
    flag,
    number,
    parse,
    run_of,
    size_of_run,
    values,
    write_run_file,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..data import DataSet
    from ..data.images import Subset
    from ..protocols import Classifier

#: The prefix of the name of a model in `purify_fast.zoo`. Without it, a text is the path of a folder.
ZOO = "zoo:"
#: The form of the name of code: torchvision:NAME, timm:NAME, package.module:function or path/to/file.py:function.
CODE = re.compile(r"(torchvision|timm):.*|(.*\.py|[^\W\d][\w.]*):[^/]*")


def zoo_name(folder: str | Path) -> str | None:
    """The name after ``zoo:``; None for a folder."""
    text = str(folder)
    return text.removeprefix(ZOO) if text.startswith(ZOO) else None


def saved_folder(folder: str | Path, classifier: bool = False) -> Path:
    """The folder of a saved model."""
    name = zoo_name(folder)
    if name is None:
        return Path(folder) / "classifier" if classifier else Path(folder)
    from .. import zoo

    return zoo.classifier_folder(name) if classifier else zoo.folder(name)


def ball_of(folder: str | Path) -> tuple[float, str] | None:
    """The radius and the norm of a model's training: of a card of the zoo, or of a run.yaml with attacks; else None."""
    if (name := zoo_name(folder)) is not None:
        from ..zoo import card

        return card(name).eps, card(name).norm
    options = run_of(Path(folder))
    eps = number(str(options.get("eps", 0)))
    return (eps, str(options.get("norm", "linf"))) if eps > 0 else None


def is_named(classifier: str) -> bool:
    """Return True if a text names code, as `CODE` describes, and not a saved model."""
    return CODE.fullmatch(classifier) is not None and zoo_name(classifier) is None and not Path(classifier).exists()


def own_model(spec: str, images: DataSet) -> Classifier:
    """Call a function of the user and return its result, which is a module or a function from images to logits."""
    from torch import nn

    from ..models.classifiers import called_by

    model: Classifier = called_by(spec)
    if not callable(model) or isinstance(model, type):
        raise ValueError(f"{spec} must return a torch.nn.Module or a function from images to logits, got {model!r}")
    return model.to(images.y_test.device) if isinstance(model, nn.Module) else model


def named_classifier(
    spec: str, weights: str | None, images: DataSet, mean: Sequence[float] = (), std: Sequence[float] = ()
) -> nn.Module:
    """Make a network by its name. With random weights, a library's network gets the statistics of the images."""
    from ..data import statistics
    from ..models.classifiers import LIBRARIES, build_foreign

    fresh = weights is None and spec.partition(":")[0] in LIBRARIES
    how: Any = statistics(images.x_train) if fresh else (mean or 0.0, std or 1.0)
    model = build_foreign(spec, images.image_shape[0], images.num_classes, mean=how[0], std=how[1], weights=weights)
    return model.to(images.y_test.device)


def trained_classifier(
    classifier: str | Path, weights: str | None, images: DataSet, mean: Sequence[float] = (), std: Sequence[float] = ()
) -> nn.Module:
    """Load a trained classifier to the device of the images."""
    from ..models.classifiers import LIBRARIES
    from ..training import load_classifier

    text = str(classifier)
    if not is_named(text):
        if weights is not None:
            raise ValueError(f"--classifier-weights is only for a classifier by name, not for the folder {classifier}")
        folder = saved_folder(classifier)
        saved = load_classifier(folder).to(images.y_train.device)
        refuse_other_images(saved, images, f"the classifier in {classifier}", folder)
        return saved
    if weights is None and text.partition(":")[0] in LIBRARIES:
        raise ValueError(f"{text} has random weights: give trained weights with --classifier-weights")
    return named_classifier(text, weights, images, mean, std).eval()


def accuracy_text(model: nn.Module, x: Tensor, y: Tensor, batch_size: int, most: int = 10**9) -> str:
    """Say how many of at most ``most`` images are classified correctly, and if a guess would be as good."""
    import torch

    from ..data import to_float
    from ..models.layers import evaluation_mode

    if len(y) > most:
        # The images of a folder are sorted by class.
        chosen = torch.linspace(0, len(y) - 1, most, device="cpu").long()
        x, y = x[chosen.to(x.device)], y[chosen.to(y.device)]
    parts = [slice(k, k + batch_size) for k in range(0, len(y), batch_size)]
    with evaluation_mode(model), torch.no_grad():
        logits = torch.cat([model(to_float(x[part])) for part in parts])
    share, classes = float((logits.argmax(1) == y).double().mean()), logits.shape[1]
    error, of_guess = ((part * (1 - part) / len(y)) ** 0.5 for part in (share, 1 / classes))
    text = f"{100 * share:.1f} ± {100 * error:.1f} % (standard error) of {len(y)} held-out images"
    return text + f", no better than a guess among {classes} classes" * (share <= 1 / classes + 2 * of_guess)


def refuse_other_images(model: nn.Module, images: DataSet, what: str, folder: Path) -> None:
    """Raise a ValueError if a model was trained on images of another size, on fewer classes or on other classes.

    A network may accept other sizes than those of its training, which the run.yaml of the folder names.
    """
    from ..data.images import same_name
    from ..defences.base import Defence

    # Every loaded classifier has the attribute `arguments`.
    facts: dict[str, Any] = model.arguments  # type: ignore[assignment]
    classes = model.num_classes if isinstance(model, Defence) else facts["num_classes"]
    channels, *size = images.image_shape
    trained = size_of_run(folder)
    usual = (facts.get("in_channels", channels), *(trained or facts.get("image_size", size)))
    shape: tuple[int, ...] = getattr(model, "image_shape", usual)
    if tuple(shape) != images.image_shape:
        own, other = ("x".join(map(str, sizes)) for sizes in (images.image_shape, shape))
        other = other if trained or shape[0] == channels else f"{shape[0]} channels"
        raise ValueError(f"images of {images.name} are {own}, but {what} was trained on {other} (--data, --size)")
    if images.num_classes > classes:
        raise ValueError(f"images have {images.num_classes} classes, but {what} has only {classes}")
    names = getattr(getattr(model, "classifier", model), "classes", None)
    for label, (own, other) in enumerate(zip(names or (), images.classes or (), strict=False)):
        if same_name(own) != same_name(other):
            raise ValueError(f"label {label} of the classes is {own!r} for {what}, but {other!r} in {images.name}")


# -- evaluate ----------------------------------------------------------------------------------------------------------

#: The options with which saved defences of all methods are loaded, as a dataclass for each method that has any.
_LOADING = [
    (name, method.loading, field(default_factory=method.loading))
    for name, method in all_methods().items()
    if method.loading
]
LoadOptions: Any = make_dataclass("LoadOptions", _LOADING, frozen=True)


@dataclass(frozen=True)
class ModelCommand(DataCommand):
    """A command on a trained model and held-out images.

    Args:
        folder: Model: a folder that a `train` command wrote, or zoo:NAME. Or your function, as path/to/file.py:function
            or package.module:function. It is called without arguments, and must return a module, or a function from
            images in [0, 1] to logits.
        classifier: Classifier behind a denoiser that `save_denoiser` wrote: a folder or zoo:NAME. Folders of other
            defences contain their classifier.
        images: Number of held-out images. The seed chooses them; the numbers per class differ by at most 1. If the data
            set has fewer, all are used, and the report says so.
        out: Folder of the report. Default: FOLDER/COMMAND, or runs/zoo/NAME/COMMAND, or for your own model
            runs/own/MODULE.FUNCTION/COMMAND, where MODULE includes the folder of the file, and COMMAND is evaluation
            or certificates.
    """

    #: The name of the report's folder.
    report_folder: ClassVar[str]

    folder: tyro.conf.Positional[Path] = Path("runs/carso")
    classifier: str | None = None
    images: Count = 500
    out: Path | None = None
    loading: LoadOptions = field(default_factory=LoadOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.own is None and self.folder.suffix == ".py":
            raise ValueError(f"{self.folder}: give also the function that returns the model, as {self.folder}:function")

    @property
    def own(self) -> str | None:
        """The name of the user's function that makes the model; None for another kind of model."""
        return str(self.folder) if is_named(str(self.folder)) else None

    def writes(self) -> Path:
        if self.out is not None:
            return self.out
        if self.own is not None:
            return Path("runs/own") / self.title() / self.report_folder
        # The folder of a model of the zoo belongs to the installed package, so reports are not written there.
        name = zoo_name(self.folder)
        if name is None and not self.folder.exists():
            raise FileNotFoundError(f"{self.folder} does not exist: train a model into it, or give zoo:NAME")
        return (self.folder if name is None else Path("runs/zoo") / name) / self.report_folder

    def title(self) -> str:
        """The model's name in the report."""
        if self.own is None:
            # The name of the path "." is empty.
            return zoo_name(self.folder) or os.path.basename(os.path.abspath(self.folder))
        source, _, function = self.own.rpartition(":")
        parts = Path(source.removesuffix(".py")).parts
        return ".".join((*("up" if part == ".." else part for part in parts if part != os.sep), function))

    def loaded(self, images: DataSet) -> tuple[Classifier, nn.Module | None]:
        """Load the attacked model, and its base (the classifier without the defence) if the model is a defence."""
        from ..methods.loading import load_defence
        from ..training import is_classifier, load_classifier

        base: nn.Module | None = None
        saved = None if self.own else saved_folder(self.folder)
        if saved is not None and not is_classifier(saved):
            base = self.behind(saved, images)
            loading = [getattr(self.loading, part.name) for part in fields(self.loading)]
            model: Any = load_defence(saved, base, **{k: v for part in loading for k, v in part.changes().items()})
        elif self.classifier is not None or self.loading != LoadOptions():
            options = ", ".join(map(flag, ("classifier", *values(self.loading))))
            raise ValueError(f"{options} are only for a saved defence, got {self.folder}")
        elif saved is None:
            return own_model(str(self.own), images), None
        else:
            model = load_classifier(saved).to(images.y_test.device)
        refuse_other_images(model, images, f"the model in {self.folder}", saved)
        return model, base

    def behind(self, folder: Path, images: DataSet) -> nn.Module:
        """Load the classifier of the defence in a folder, to the device of the images."""
        from ..methods.loading import needs_classifier
        from ..training import load_classifier

        if self.classifier is not None:
            return trained_classifier(self.classifier, None, images)
        if needs_classifier(folder):
            raise ValueError(f"--classifier must be given: {self.folder} contains a part of a defence without it")
        return load_classifier(saved_folder(self.folder, classifier=True)).to(images.y_test.device)

    def chosen(self, images: DataSet, seed: int) -> tuple[Subset, list[str]]:
        """The held-out images that are used, and notes for the report about how they were chosen."""
        import torch

        from ..data.images import Subset, balanced_subset

        count = len(images.y_test)
        if self.images >= count:
            fewer = f", which are fewer than --images {self.images}" if self.images > count else ""
            ids = torch.arange(count, device=images.y_test.device)
            return Subset(images.x_test[:], images.y_test, ids), [f"all {count} held-out images{fewer}"]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            subset = balanced_subset(images.x_test, images.y_test, self.images, seed, num_classes=images.num_classes)
        choice = f"chosen by the seed {seed}; the numbers of images per class differ by at most 1"
        notes = [f"{len(subset.y)} of the {count} held-out images, {choice}"]
        return subset, notes + [str(warning.message) for warning in caught]


@dataclass(frozen=True)
class Evaluate(ModelCommand):
    """Attack a saved classifier or defence, or your own model, on held-out images, and write a report.

    An interrupted evaluation continues if the same command is run again.

    Args:
        eps: Radius in image units, such as 8/255. Default: the radius of the training. Required for your own model.
        norm: Norm of the ball. Default: the norm of the training, or linf if --eps is given.
        precision: Precision of the computation. tf32: a GPU rounds the factors of products to 10 bits of mantissa.
            bfloat16: a frozen copy of the defence, whose logits differ slightly, because it rounds numbers to 8 bits.
            The report names the precision.
    """

    called: ClassVar[str] = "evaluate"
    example: ClassVar[str] = "runs/pets --data pets --size 64 --protocol fast"
    report_folder: ClassVar[str] = EVALUATION

    eps: float | None = None
    norm: Norm | None = None
    precision: Precision = "float32"
    settings: EvaluateConfig = field(default_factory=EvaluateConfig)

    def ball(self) -> tuple[float, str]:
        """The radius and the norm of the attacks; by default of the training, or of a zoo model's evaluation."""
        if self.eps is not None:
            return self.eps, self.norm or "linf"
        if (ball := ball_of(self.folder)) is None:
            run = (self.folder / RUN_FILE).is_file()
            why = "was trained without attacks" if run else "is your own" if self.own else f"has no {RUN_FILE}"
            raise ValueError(f"--eps must be given, such as --eps 8/255: {self.folder} {why}, so no radius is known")
        if self.norm not in (None, ball[1]):
            raise ValueError(f"--norm {self.norm} needs --eps too: the training had {ball[1]} {ball[0]:g}")
        return ball

    def prepared(self, images: DataSet) -> tuple[Classifier, nn.Module | None]:
        """Load the models; a frozen copy of the defence if --precision asks for it."""
        import torch

        from ..data import to_float
        from ..defences.base import Defence
        from ..speed.frozen_copy import frozen_copy

        model, base = self.loaded(images)
        if self.precision in ("bfloat16", "auto"):
            if not isinstance(model, Defence):
                raise ValueError(f"--precision {self.precision} is only for defences of this package")
            dtype: Any = torch.bfloat16 if self.precision == "bfloat16" else "auto"
            model = frozen_copy(model, to_float(images.x_test[:8].to(images.y_test.device)), dtype=dtype)
        return model, base

    def run(self) -> None:
        from .._process import processes
        from ..evaluation import evaluate
        from ..speed.precision import float32_products

        images = self.load_data(train=False)
        model, base = self.prepared(images)
        out, (eps, norm) = self.writes(), self.ball()
        chosen, notes = self.chosen(images, self.settings.seed)
        settings = replace(self.settings, dataset_name=self.settings.dataset_name or images.name)
        how: Any = {"norm": read_norm(norm), "base": base, "out": out, "name": self.title(), "config": settings}
        with float32_products(tf32=self.precision == "tf32"):
            report = evaluate(model, chosen.x, chosen.y, eps=eps, **how)
        if processes()[0] > 0:
            return
        report.notes += notes
        report.about["command"] = shlex.join(["purify-fast", *self.typed])
        before = replaced(out / REPORT, lambda old: ball_and_protocol(old["about"]), ball_and_protocol(report.about))
        report.save(out, model)
        write_run_file(self, out)
        print(report.to_text())
        print(f"written: {out}/report.html, report.md and report.json{before}")


def ball_and_protocol(about: dict[str, str]) -> str:
    """The settings of a report that its reader must know, such as ``L-inf 0.2 fast``."""
    return " ".join(filter(None, (about.get("threat"), about.get("protocol"))))


def replaced(path: Path, settings: Callable[[Any], str], now: str) -> str:
    """The end of a line: the settings of the report in a file that this one replaces; empty if there is no other."""
    try:
        was = settings(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError):
        return ""
    return "" if was == now else f"; this replaced the report {was}, whose work is kept: --out gives another folder"


@dataclass(frozen=True)
class Check(Command):
    """Give the adversarial images of a report, which `evaluate` saved, to a model again.

    The exit status is 1 if the predictions do not fit the report: an image is classified correctly now, or for a random
    model at least half of the images.

    Args:
        report: Folder of the report, or of the run that was evaluated.
        model: Model that classifies, as in `evaluate`: a folder, zoo:NAME or your function. Default: the model of the
            report, which its run.yaml names. The options of the evaluation hold for it in any case.
        batch_size: Number of images in one forward pass.
        seed: Seed of the draws of a random defence. Default: a seed that differs from the report's.
        device: Device to compute on: cpu, cuda, or another device of PyTorch. auto: a GPU if there is any.
    """

    called: ClassVar[str] = "check"
    example: ClassVar[str] = "runs/pets"

    report: tyro.conf.Positional[Path | None] = None
    model: tyro.conf.Positional[str | None] = None
    batch_size: Count = 250
    seed: int | None = None
    device: str = "auto"

    def run(self) -> int:
        import torch

        from ..data import DataSet
        from ..judge.show.report import Adversarial, check_adversarial
        from ..speed.precision import float32_products

        if self.report is None:
            raise ValueError("REPORT must be given: the folder of a report, or of the run that was evaluated")
        places = [place for place in (self.report / EVALUATION, self.report) if place.is_dir()] or [self.report]
        folder = next((place for place in places if (place / REPORT).is_file()), None)
        if folder is None:
            raise FileNotFoundError(f"{places[0]} contains no {REPORT}: it {what_is(places[0])}")
        run = folder / RUN_FILE
        if self.model is None and not run.is_file():
            raise ValueError(f"MODEL must be given: a folder, zoo:NAME or your function; {folder} has no {RUN_FILE}")
        judged = parse(Evaluate, ["--config", str(run)] if run.is_file() else [])
        saved = Adversarial.load(folder)
        # The model is loaded to the device of these images, and refuses images of another size.
        parts = (torch.from_numpy(saved.images).mul(255).round().byte(), torch.from_numpy(saved.labels)) * 2
        images = DataSet(*parts, name="this report", num_classes=1).to(usable_device(self.device))
        precision: Any = saved.about["precision"] if saved.about["precision"] in ("tf32", "bfloat16") else "float32"
        # The classifier and the options of a defence are those of the evaluation.
        options = {"folder": Path(self.model) if self.model is not None else judged.folder, "precision": precision}
        model, _ = replace(judged, **options).prepared(images)
        with float32_products(tf32=precision == "tf32"):
            checked = check_adversarial(folder, model, batch_size=self.batch_size, seed=self.seed)
        print(checked.to_text())
        return 0 if checked.fits else 1
