"""``purify-fast evaluate``."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import tyro

from .._lock import folder_lock
from .._validation import CudaGraphs, CudnnBenchmark, Norm, Precision
from .classifiers import (
    is_named,
    own_folder,
    own_model,
    own_name,
    refuse_other_images,
    saved_classifier,
    saved_folder,
    zoo_name,
)
from .config_file import ball_of_run, write_run_file
from .data_args import DataCommand
from .option_types import check_radius

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..data import DataSet


Published = Literal["cifar10", "cifar100", "tiny_imagenet"]


@dataclass(frozen=True)
class Evaluate(DataCommand):
    """Attack a saved classifier or defence, or a model of your own, on held-out images; writes a report. Resumes."""

    called: ClassVar[str] = "evaluate"

    folder: tyro.conf.Positional[Path] = Path("runs/carso")
    """What to attack: a folder that one of the `train` commands wrote, or zoo:NAME, which comes with the package.
    Or a function of yours without arguments that returns a module from images in [0, 1] to logits.
    It is named as path/to/file.py:function or package.module:function, which is imported and run."""
    official: Path | None = None
    """A folder with the weights that CARSO's authors published, in FOLDER's place: the three .safetensors files of the
    purifier, and the file of its classifier. It needs --recipe."""
    recipe: Published | None = None
    """Which published system --official holds. It brings the data set, K and the radius."""
    classifier_weights: Path | None = None
    """The classifier's file, if it is not in the folder --official; .safetensors, or a .pt of which only tensors are
    read."""
    eps: float | None = None
    """Radius in image units, such as 8/255; default: what FOLDER was trained at. Of your own model it must be given."""
    norm: Norm | None = None
    """Norm of the ball; default: what FOLDER was trained at, or linf if eps is given."""
    protocol: Literal["fast", "standard", "rand", "strong", "official", "authors"] = "standard"
    """Which attacks are run: fast, Auto-PGD in minutes; standard, AutoAttack's four with this package's engine; rand,
    its version for random defences; strong, what a careful attacker would do; official, AutoAttack itself; authors,
    what those who published the defence ran, to compare with their numbers. The last two need the package pyautoattack.
    A list of attacks of your own is given in Python."""
    images: int = 500
    """Held-out images to attack: so many, chosen by the seed, equally many of every class up to one.
    Where there are fewer, all of them are attacked, and the report says so."""
    steps: int = 100
    """Steps of PGD and Auto-PGD, where the protocol does not say; FAB-T always takes its authors' 100."""
    eot_iter: int = 5
    """Draws of the defence that each step averages over."""
    n_eval: int = 5
    """Independent predictions of a random defence on each attacked image; it is robust if all of them are right."""
    batch_size: int = 250
    """Images that are attacked together."""
    max_forward_batch: int | None = None
    """Images in one forward pass of PGD at most; bounds the memory, exact but for which image gets which draws."""
    cuda_graphs: CudaGraphs = "auto"
    """On a GPU, capture a step of an attack once and replay it: where launching takes longer than computing (auto),
    wherever that is possible, or never."""
    cudnn_benchmark: CudnnBenchmark = "off"
    """On a GPU, let cuDNN race its algorithms for each shape of a batch, which may change the last bits from run to
    run; auto: unless the process asks for deterministic algorithms."""
    seed: int = 0
    """Seed of everything random."""
    precision: Precision = "float32"
    """tf32 lets a GPU round what it multiplies to 10 bits. bfloat16 evaluates the accelerated defence, a slightly
    different function: images are rounded to 8 bits. The report says which it was."""
    out: Path | None = None
    """Where the report goes; default: FOLDER/evaluation, of a model of the zoo runs/zoo/NAME/evaluation.
    Of a model of your own it is runs/own/MODULE.FUNCTION/evaluation; a file in another folder has a sign of its place
    behind the name."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eps is not None:
            check_radius(self.eps, self.norm or "linf")
        if (self.official is None) != (self.recipe is None):
            names = ", ".join(get_args(Published))
            raise ValueError(f"--official FOLDER and --recipe go together; recipe is one of {names}")
        if self.classifier_weights is not None and self.official is None:
            raise ValueError("--classifier-weights is the classifier of a published system: it needs --official")

    @property
    def attacked(self) -> Path:
        """The folder of what is attacked."""
        return self.folder if self.official is None else self.official

    @property
    def own(self) -> str | None:
        """The place of the user's function that makes the model; None for everything else."""
        given = str(self.folder)
        return given if self.official is None and is_named(given) else None

    def writes(self) -> Path:
        if self.out is not None:
            return self.out
        if self.official is not None:
            return self.official / "evaluation"
        if self.own is not None:
            return Path("runs/own") / own_folder(self.own) / "evaluation"
        name = zoo_name(self.folder)
        # the folder of a model of the zoo belongs to the installed package
        return (self.folder if name is None else Path("runs/zoo") / name) / "evaluation"

    def ball(self) -> tuple[float, str]:
        """The radius and the norm to attack with."""
        if self.eps is not None:
            return self.eps, self.norm or "linf"
        if self.own is not None:
            raise ValueError(f"--eps must be given, such as --eps 8/255: {self.own} does not say what it is for")
        name = zoo_name(self.folder)
        found: tuple[float, str] | None
        if self.recipe is not None:
            found = self.ball_of_recipe(self.recipe)
        else:
            found = ball_of_run(self.folder) if name is None else self.ball_of_card(name)
        if found is None:
            raise ValueError(
                f"--eps must be given, such as --eps 8/255: {self.folder} does not say what it was trained at, or was "
                "trained on clean images"
            )
        if self.norm not in (None, found[1]):
            raise ValueError(
                f"--norm {self.norm} needs an --eps: {self.attacked} was trained at {found[1]} {found[0]:g}"
            )
        return found

    @staticmethod
    def ball_of_card(name: str) -> tuple[float, str]:
        """The radius and the norm that a model of the zoo was judged at."""
        # PyTorch takes 1.8 seconds to import: --help does without it
        from .. import zoo

        card = zoo.card(name)
        return card.eps, card.norm

    @staticmethod
    def ball_of_recipe(name: str) -> tuple[float, str]:
        """The radius and the norm that a published system was trained at."""
        # PyTorch takes 1.8 seconds to import: --help does without it
        from ..methods.carso.recipes import system

        return system(name)["attack.eps"], "linf"

    def title(self) -> str:
        """How the model is called in the report."""
        if self.recipe is not None:
            return f"CARSO, its authors' weights, {self.recipe}"
        return zoo_name(self.folder) or (self.folder.name if self.own is None else own_name(self.own))

    def loaded(self, images: DataSet) -> tuple[nn.Module, nn.Module | None]:
        """What is attacked, and the classifier without its defence, if it is one."""
        # PyTorch takes 1.8 seconds to import: --help does without it
        from ..methods.carso import load_published
        from ..methods.loading import load_defence
        from ..training import is_classifier, load_classifier

        device = images.y_test.device
        if self.official is not None and self.recipe is not None:
            published = load_published(self.recipe, self.official, self.classifier_weights).to(device)
            refuse_other_images(published, images, f"the system in {self.official}")
            return published, published.classifier
        if self.own is not None:
            return own_model(self.own, images), None
        if self.folder.suffix == ".py":
            raise ValueError(f"{self.folder}: name the function that returns the model too, as {self.folder}:function")
        folder = saved_folder(self.folder)
        if is_classifier(folder):
            model, base = load_classifier(folder).to(device), None
        else:
            base = load_classifier(saved_classifier(self.folder)).to(device)
            model = load_defence(folder, base)
        refuse_other_images(model, images, f"the model in {self.folder}")
        return model, base

    def chosen(self, images: DataSet) -> tuple[Tensor, Tensor, list[str]]:
        """The held-out images to attack, their labels, and what the report must say of the choice."""
        # PyTorch takes 1.8 seconds to import: --help does without it
        from ..data import balanced_subset

        if self.images < 1:
            raise ValueError(f"images must be at least 1, got {self.images}")
        count = len(images.y_test)
        if self.images >= count:
            fewer = f": --images {self.images} asks for more than there are" if self.images > count else ""
            return images.x_test[:], images.y_test, [f"all {count} held-out images{fewer}"]
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found = balanced_subset(
                images.x_test, images.y_test, self.images, self.seed, num_classes=images.num_classes
            )
        notes = [
            f"{len(found.y)} of the {count} held-out images, chosen by the seed {self.seed}, equally many of every "
            "class up to one"
        ]
        return found.x, found.y, notes + [str(warning.message) for warning in told]

    def run(self) -> None:
        # PyTorch takes 1.8 seconds to import: --help does without it
        import torch

        # and so does what imports it
        from ..defences.base import Defence

        images = self.load_data()
        model, base = self.loaded(images)
        eps, norm = self.ball()
        if self.precision == "bfloat16":
            if not isinstance(model, Defence):
                raise ValueError(f"precision bfloat16 is for defences of this package; {self.folder} is none")
            model.accelerate(torch.bfloat16)
        # the command line has locked the folder already where what is attacked is a folder itself
        with folder_lock(None if self.attacked.is_dir() else self.writes()):
            self.judge(model, base, images, eps, norm)

    def judge(self, model: nn.Module, base: nn.Module | None, images: DataSet, eps: float, norm: str) -> None:
        """Attack a model, print the report and write it.

        Args:
            model: what is attacked.
            base: the classifier without its defence; None where there is none.
            images: of which the held-out ones are attacked.
            eps: radius of the ball in image units.
            norm: of the ball.
        """
        # PyTorch takes 1.8 seconds to import: --help does without it
        from ..attacks.arguments import read_norm
        from ..evaluation import evaluate
        from ..speed.precision import float32_products

        out = self.writes()
        x, y, notes = self.chosen(images)
        if self.images > len(y):
            # at once, and in the report: an evaluation may take hours
            print(f"purify-fast: {notes[0]}", file=sys.stderr)
        with float32_products(tf32=self.precision == "tf32"):
            report = evaluate(
                model,
                x,
                y,
                eps=eps,
                norm=read_norm(norm),
                base=base,
                protocol=self.protocol,
                steps=self.steps,
                eot_iter=self.eot_iter,
                n_eval=self.n_eval,
                batch_size=self.batch_size,
                max_forward_batch=self.max_forward_batch,
                cuda_graphs=self.cuda_graphs,
                cudnn_benchmark=self.cudnn_benchmark,
                seed=self.seed,
                out=out,
                name=self.title(),
                dataset_name=images.name,
            )
        report.notes += notes
        print(report.to_text())
        report.save(out, model)
        write_run_file(self, out)
        print(f"written: {out}/report.html, report.md, report.json and pictures")
