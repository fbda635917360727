"""``purify-fast evaluate``."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import tyro

from .._files import folder_lock
from .._validation import Count, Norm, Precision, read_norm
from ..evaluation.config import EvaluateConfig
from .command import DataCommand
from .run_file import EVALUATION, ball_of_run, write_run_file
from .saved_models import is_named, own_model, refuse_other_images, saved_folder, trained_classifier, zoo_name
from .train_diffusion import Purification

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..data import DataSet
    from ..methods.carso import Carso
    from ..protocols import Classifier


Published = Literal["cifar10", "cifar100", "tiny_imagenet"]


@dataclass(frozen=True)
class Evaluate(DataCommand, Purification):
    """Attack a saved classifier or defence, or a model of your own, on held-out images; writes a report. Resumes.

    Args:
        folder: What to attack: a folder that one of the `train` commands wrote, or zoo:NAME, which comes with the
            package. Or a function of yours without arguments that returns a module, or a function, from images in
            [0, 1] to logits. It is named as path/to/file.py:function or package.module:function, which is imported and
            run.
        official: A folder with the weights that CARSO's authors published, in FOLDER's place: the three .safetensors
            files of the purifier, and the file of its classifier. It needs --recipe.
        recipe: Which published system --official holds. It brings the data set, K and the radius.
        classifier: The classifier behind a denoiser that `train diffusion` wrote: a folder or zoo:NAME. Other defences
            bring theirs.
        classifier_weights: The classifier's file, if it is not in the folder --official; .safetensors, or a .pt of
            which only tensors are read.
        eps: Radius in image units, such as 8/255; default: what FOLDER was trained at. For your own model it must be
            given.
        norm: Norm of the ball; default: what FOLDER was trained at, or linf if eps is given.
        images: Held-out images to attack: so many, chosen by the seed; the numbers of images per class differ by at
            most 1. Where there are fewer, all of them are attacked, and the report says so.
        precision: tf32 lets a GPU round what it multiplies to 10 bits. bfloat16 evaluates the accelerated defence, a
            slightly different function: images are rounded to 8 bits. The report says which it was.
        out: Where the report goes; default: FOLDER/evaluation, for a model of the zoo runs/zoo/NAME/evaluation. A
            model of your own has runs/own/MODULE.FUNCTION/evaluation; a file in another folder has the folder's name in
            front.
    """

    called: ClassVar[str] = "evaluate"

    folder: tyro.conf.Positional[Path] = Path("runs/carso")
    official: Path | None = None
    recipe: Published | None = None
    classifier: str | None = None
    classifier_weights: Path | None = None
    eps: float | None = None
    norm: Norm | None = None
    images: Count = 500
    precision: Precision = "float32"
    out: Path | None = None
    settings: EvaluateConfig = field(default_factory=EvaluateConfig)

    def __post_init__(self) -> None:
        if self.norm is not None:
            # the dataclass is frozen
            object.__setattr__(self, "norm", read_norm(self.norm))
        super().__post_init__()
        if self.own is None and self.folder.suffix == ".py":
            raise ValueError(f"{self.folder}: name the function that returns the model too, as {self.folder}:function")
        if (self.official is None) != (self.recipe is None):
            names = ", ".join(get_args(Published))
            raise ValueError(f"--official FOLDER and --recipe need each other: give both; recipe is one of {names}")
        if self.classifier_weights is not None and self.official is None:
            raise ValueError("--classifier-weights names the classifier of a published system: give --official too")

    @property
    def own(self) -> str | None:
        """The place of the user's function that makes the model; None for everything else."""
        return str(self.folder) if self.official is None and is_named(str(self.folder)) else None

    @property
    def of_zoo(self) -> str | None:
        """The name of the model of the zoo; None for everything else."""
        return zoo_name(self.folder) if self.official is None else None

    def writes(self) -> None:
        """Nothing before the model is loaded, so that a missing model leaves no folder."""

    def report_folder(self) -> Path:
        """The folder of the report."""
        if self.out is not None:
            return self.out
        if self.own is not None:
            return Path("runs/own") / self.title() / EVALUATION
        # the folder of a model of the zoo belongs to the installed package
        place = self.official or self.folder if self.of_zoo is None else Path("runs/zoo") / self.of_zoo
        return place / EVALUATION

    def title(self) -> str:
        """The model's name in the report."""
        if self.recipe is not None:
            return f"CARSO, its authors' weights, {self.recipe}"
        if self.own is None:
            return self.of_zoo or self.folder.name
        source, _, function = self.own.rpartition(":")
        if source.endswith(".py"):
            # relative to the working folder, so that both may be moved together
            file = os.path.relpath(Path(source).resolve(), Path.cwd().resolve())
            source = file.removesuffix(".py").replace("..", "up").replace(os.sep, ".")
        return f"{source}.{function}"

    def ball(self) -> tuple[float, str]:
        """The radius and the norm to attack with."""
        if self.eps is not None:
            return self.eps, self.norm or "linf"
        if self.own is not None:
            raise ValueError(f"--eps must be given, such as --eps 8/255: {self.own} does not say what it is for")
        where, ball = self.official or self.folder, self.trained_ball()
        if ball is None:
            raise ValueError(
                f"--eps must be given, such as --eps 8/255: {where} does not say what it was trained at, or was "
                "trained on clean images"
            )
        if self.norm not in (None, ball[1]):
            raise ValueError(f"--norm {self.norm} needs an --eps: {where} was trained at {ball[1]} {ball[0]:g}")
        return ball

    def trained_ball(self) -> tuple[float, str] | None:
        """The radius and the norm that a saved model was trained at, or a model of the zoo was judged at."""
        if self.recipe is not None:
            from ..methods.recipes import recipe

            return recipe(self.recipe, "carso")["attack.eps"], "linf"
        if self.of_zoo is not None:
            from .. import zoo

            card = zoo.card(self.of_zoo)
            return card.eps, card.norm
        return ball_of_run(self.folder)

    def loaded(self, images: DataSet) -> tuple[Classifier, nn.Module | None]:
        """The attacked model, and the classifier without its defence if the model is a defence."""
        from ..methods.loading import load_defence
        from ..methods.recipes import recipe
        from ..training import is_classifier, load_classifier

        device = images.y_test.device
        saved = self.own is None and self.recipe is None
        if saved and not is_classifier(folder := saved_folder(self.folder)):
            base = self.behind(folder, images)
            model: nn.Module = load_defence(folder, base, process=self.process())
            refuse_other_images(model, images, f"the model in {self.folder}")
            return model, base
        if self.classifier is not None or self.process() is not None:
            options = "--classifier, --t-star, --denoising-steps and --solver"
            raise ValueError(
                f"{options} need a saved purifier, and {self.own or self.official or self.folder} is not one"
            )
        if self.own is not None:
            return own_model(self.own, images), None
        if self.recipe is not None:
            system: Carso = recipe(self.recipe, "carso").load(self.official, self.classifier_weights).to(device)
            refuse_other_images(system, images, f"the system in {self.official}")
            return system, system.classifier
        model = load_classifier(folder).to(device)
        refuse_other_images(model, images, f"the model in {self.folder}")
        return model, None

    def prepared(self, images: DataSet) -> tuple[Classifier, nn.Module | None]:
        """The models of `loaded` in the requested precision, except TF32, which is a setting of PyTorch."""
        import torch

        from ..defences.base import Defence

        model, base = self.loaded(images)
        if self.precision == "bfloat16":
            if not isinstance(model, Defence):
                raise ValueError(f"precision bfloat16 is for defences of this package, and {self.folder} is not one")
            model.accelerate(torch.bfloat16)
        return model, base

    def behind(self, folder: Path, images: DataSet) -> nn.Module:
        """The classifier behind the defence in a folder, on the images' device."""
        from ..methods.loading import is_denoiser
        from ..training import load_classifier

        if self.classifier is not None:
            return trained_classifier(self.classifier, None, images)
        if is_denoiser(folder):
            raise ValueError(f"--classifier must be given: {self.folder} holds a denoiser alone")
        return load_classifier(saved_folder(self.folder, classifier=True)).to(images.y_test.device)

    def chosen(self, images: DataSet) -> tuple[Tensor, Tensor, list[str]]:
        """The held-out images to attack, their labels, and what the report must say of the choice."""
        from ..data import balanced_subset

        count = len(images.y_test)
        if self.images >= count:
            fewer = f": --images {self.images} asks for more than there are" if self.images > count else ""
            return images.x_test[:], images.y_test, [f"all {count} held-out images{fewer}"]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            subset = balanced_subset(
                images.x_test, images.y_test, self.images, self.settings.seed, num_classes=images.num_classes
            )
        choice = f"chosen by the seed {self.settings.seed}; the numbers of images per class differ by at most 1"
        notes = [f"{len(subset.y)} of the {count} held-out images, {choice}"]
        return subset.x, subset.y, notes + [str(warning.message) for warning in caught]

    def run(self) -> None:
        from .._validation import check_folder
        from ..attacks.arguments import check_eps
        from ..training.distributed import from_first

        check_folder("--out" if self.out is not None else "the report's folder", self.report_folder())
        if self.eps is not None:
            check_eps(self.eps, self.norm or "linf")
        with contextlib.ExitStack() as stack:
            # the first of several processes writes; all of them are refused together
            from_first(lambda: stack.enter_context(folder_lock(self.report_folder())))
            self.judge(self.load_data())

    def judge(self, images: DataSet) -> None:
        """Attack the model; print the report and write it."""
        from .._process import processes
        from ..evaluation import evaluate
        from ..speed.precision import float32_products

        model, base = self.prepared(images)
        out, (eps, norm) = self.report_folder(), self.ball()
        x, y, notes = self.chosen(images)
        if self.images > len(y):
            # say it now and in the report: an evaluation may take hours
            print(f"purify-fast: {notes[0]}", file=sys.stderr)
        with float32_products(tf32=self.precision == "tf32"):
            report = evaluate(
                model,
                x,
                y,
                eps=eps,
                config=replace(self.settings, dataset_name=self.settings.dataset_name or images.name),
                norm=read_norm(norm),
                base=base,
                out=out,
                name=self.title(),
            )
        if processes()[0] > 0:
            return
        report.notes += notes
        report.about.pop("call")
        report.about["command"] = shlex.join(["purify-fast", *self.typed])
        print(report.to_text())
        report.save(out, model)
        write_run_file(self, out)
        print(f"written: {out}/report.html, report.md and report.json")
