"""The command line: ``purify-fast demo | train classifier|carso|generator|atop|arrest | ablate | evaluate | info``."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import nn

from . import demo, info
from ._process import processes
from .data import DataSet, statistics
from .data import load as load_data
from .defences.base import Defence
from .evaluation import Attack, default_attacks, evaluate, lee_kim_2023
from .methods.arrest import AblationConfig, ArrestConfig, ArrestTask, Teacher, ablate
from .methods.atop import Atop, AtopConfig, AtopTask, DeepFillGenerator
from .methods.atop import load as load_atop
from .methods.atop.purifier import build_purifier
from .methods.carso import Carso, CarsoConfig, CarsoTask
from .methods.carso import load as load_carso
from .methods.carso.presets import preset
from .methods.saving import load
from .models.classifiers import CLASSIFIERS, build_classifier, representation_before_pooling
from .training import (
    ClassifierConfig,
    ClassifierTask,
    FitConfig,
    Task,
    fit,
    keep_memory,
    load_classifier,
    save_classifier,
)
from .training.checkpoint import fingerprint, read_model
from .training.defences import save_defence
from .training.distributed import in_turn, launched, own_device, torchrun_group


@dataclass(frozen=True)
class Demo:
    """Train and attack ten models on digits; prints a table, writes a report with pictures. Resumes where it was."""

    out: Path = Path("runs/demo")
    quick: bool = False
    """The same path in about a minute, with numbers that mean nothing; writes to OUT-quick."""
    seed: int = 0

    def run(self) -> None:
        demo.run(self.out, self.quick, self.seed)


def _path_or_none(text: str | None) -> Path | None:
    return Path(text) if text else None


@dataclass(frozen=True)
class _Data:
    data: str = "digits"
    """digits, mnist, fashion_mnist, cifar10, cifar100, svhn, imagenette, tiny_imagenet, an .npz file with
    x_train y_train x_test y_test, or a folder with train/<class>/*.jpg|png and val/ or test/."""
    data_root: Path | None = field(default_factory=lambda: _path_or_none(os.environ.get("PURIFY_FAST_DATA")))
    """Where data sets are looked for and downloaded to; default: PURIFY_FAST_DATA, else the current folder."""
    download: bool = False
    """Let torchvision download the official files if they are missing."""
    image_size: tuple[int, int] | None = None
    """Height and width an image folder's images are resized and cropped to."""
    stream: bool = False
    """Read an image folder batch by batch from its decoded copy even if it fits into memory, as for a smaller GPU."""
    cache: Path | None = None
    """Where an image folder's decoded images are kept; default: .purify_fast in that folder."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"

    def load(self) -> DataSet:
        found = load_data(
            self.data,
            self.data_root,
            download=self.download,
            image_size=self.image_size,
            stream=self.stream,
            cache=self.cache,
        )
        return found.to(self.device)

    def attacked_by(self, folder: Path, eps: float, norm: str) -> str:
        """The command that attacks what was trained here: the same images, the same ball."""
        words = ["purify-fast", "evaluate", str(folder), "--data", self.data]
        if self.data_root is not None:
            words += ["--data-root", str(self.data_root)]
        if self.image_size is not None:
            words += ["--image-size", *map(str, self.image_size)]
        words += ["--eps", f"{eps:.6g}"] + (["--norm", norm] if norm != "linf" else [])
        return f"saved to {folder}; attack it with: {shlex.join(words)}"


@dataclass(frozen=True)
class TrainClassifier(_Data):
    """Train a classifier: standard (eps 0) or on PGD examples. Resumes if OUT holds an unfinished run."""

    out: Path = Path("runs/classifier")
    model: str = "small_cnn"
    """small_cnn, preact_resnet18, wide_resnet or fully_connected."""
    width: int | None = None
    """Channels of the first stage (small_cnn 16, preact_resnet18 64), or wide_resnet's factor (10)."""
    depth: int | None = None
    """Of wide_resnet (28)."""
    attack: ClassifierConfig = field(default_factory=ClassifierConfig)
    loop: FitConfig = field(default_factory=lambda: FitConfig(epochs=30))

    def run(self) -> None:
        images = in_turn(self.load)
        torch.manual_seed(self.loop.seed)
        model = _new_classifier(self, images)
        task = ClassifierTask(model, self.attack)
        print(fit(task, images.x_train, images.y_train, self.loop, self.out, "classifier"))
        if processes()[0] > 0:
            return
        save_classifier(model, self.out)
        eps = self.attack.attack.eps
        report = evaluate(model, images.x_test[:], images.y_test, eps=eps, attacks=[], name="classifier")
        print(report.to_text(sys.stdout.isatty()))
        print(f"saved to {self.out}")


def _new_classifier(command: TrainClassifier | TrainArrest | Ablate, images: DataSet) -> nn.Module:
    """A classifier with fresh weights for the images, as ``--model``, ``--width`` and ``--depth`` say."""
    mean, std = statistics(images.x_train)
    sizes = {"width": command.width, "depth": command.depth}
    made = build_classifier(
        command.model or "small_cnn", images.image_shape, images.num_classes, **sizes, mean=mean, std=std
    )
    return made.to(command.device)


def _train_defence(
    command: TrainCarso | TrainGenerator,
    images: DataSet,
    task: Task,
    defence: Defence,
    classifier: nn.Module,
    title: str,
) -> None:
    """Train, and save the defence with its classifier beside it."""
    if images.image_shape != defence.image_shape:
        raise ValueError(
            f"--data {command.data}: its images are {images.image_shape}, the purifier's {defence.image_shape}"
        )
    if images.num_classes > defence.num_classes:
        raise ValueError(
            f"--data {command.data}: it has {images.num_classes} classes, the classifier {defence.num_classes}"
        )
    print(fit(task, images.x_train, images.y_train, command.loop, command.out, title))
    if processes()[0] > 0:
        return
    save_defence(defence, command.out)
    save_classifier(classifier, command.out / "classifier")
    print(command.attacked_by(command.out, command.method.attack.eps, command.method.attack.norm))


def _given(command: Any, *options: str) -> dict[str, Any]:
    """Those of a command's options that were given: None stands for a default that lies elsewhere."""
    values = {name: getattr(command, name) for name in options}
    return {name: value for name, value in values.items() if value is not None and value is not False}


_SIZES: dict[str, Any] = {
    "layers": demo.carso.LAYERS, "cond_dim": 64, "latent_dim": 8, "samples": 8, "decoder_width": 8,
}  # fmt: skip


@dataclass(frozen=True)
class TrainCarso(_Data):
    """Train CARSO's purifier on a saved classifier, as published or through the pipeline. Resumes an unfinished run."""

    classifier: Path = Path("runs/classifier")
    """A folder that `train classifier` wrote."""
    out: Path = Path("runs/carso")
    preset: str | None = None
    """A published system: cifar10, cifar100, tiny_imagenet or mnist_v1; its numbers become this command's defaults."""
    official_code: bool = False
    """With --preset: as its code runs it, which attacks with a larger eps, and never on TinyImageNet."""
    init: Path | None = None
    """Start from a saved purifier, as when fine-tuning through the pipeline."""
    layers: tuple[str, ...] | None = None
    """Modules of the classifier whose outputs form the representation (small_cnn: conv2 conv4 hidden)."""
    cond_dim: int | None = None
    """Default: 64."""
    latent_dim: int | None = None
    """Default: 8."""
    samples: int | None = None
    """Default: 8."""
    decoder_width: int | None = None
    """Default: 8."""
    method: CarsoConfig = field(default_factory=CarsoConfig)
    loop: FitConfig = field(default_factory=lambda: FitConfig(epochs=40, batch_size=64))

    @staticmethod
    def of_preset(name: str, official_code: bool) -> TrainCarso:
        """This command with the numbers of a preset."""
        made = preset(name)
        sizes = {key: getattr(made, key) for key in ("layers", "cond_dim", "latent_dim", "samples")}
        return TrainCarso(
            preset=name, official_code=official_code, method=made.method(official_code), loop=made.loop(), **sizes
        )

    def run(self) -> None:
        if self.preset is not None and (self.init is not None or self.decoder_width is not None):
            raise ValueError("--preset brings its own purifier: leave out --init and --decoder-width")
        if self.official_code and self.preset is None:
            raise ValueError("--official-code is of a --preset: name one")
        images = in_turn(self.load)
        classifier = load_classifier(self.classifier).to(self.device)
        torch.manual_seed(self.loop.seed)
        origin = "scratch"
        if self.init is not None:
            if given := _given(self, *_SIZES):
                raise ValueError(f"--init {self.init} brings its own sizes; leave out {', '.join(given)}")
            defence = load_carso(self.init, classifier)
            origin = fingerprint(defence)
        elif self.preset is not None:
            defence = Carso.from_preset(self.preset, classifier, **_given(self, *_SIZES))
        else:
            defence = Carso(classifier, image_shape=images.image_shape, **(_SIZES | _given(self, *_SIZES)))
        _train_defence(self, images, CarsoTask(defence, self.method, origin), defence, classifier, "carso")


_TRANSFORM = ("transform", "sigma", "block", "missing", "parts", "samples", "aggregation", "shared_mask")


@dataclass(frozen=True)
class TrainGenerator(_Data):
    """Pre-train AToP's purifier on clean images: hinge GAN and L1. Resumes an unfinished run."""

    classifier: Path = Path("runs/classifier")
    """A folder that `train classifier` wrote; pre-training does not use it, what is saved names it."""
    out: Path = Path("runs/generator")
    purifier: str | None = None
    """small_generator (default), deepfill (height and width multiples of 8; made for 256, its attention needs 128) or
    masked_autoencoder."""
    width: int | None = None
    """Of the purifier's network (8, 48 and 64)."""
    residual: bool = False
    """Of a small_generator: it corrects the image in place of painting one."""
    weights: Path | None = None
    """Of deepfill: a checkpoint of deepfillv2-pytorch to start from; only tensors are read from it."""
    transform: str | None = None
    """rt1 hides blocks, rt2 (default) adds noise before, rt3 hides every block once in several passes."""
    sigma: float | None = None
    """Standard deviation of the noise in image units; default: 0.25."""
    block: int | None = None
    """Side of a block in pixels; default: what tiles the image and is nearest to an eighth of the height."""
    missing: float | None = None
    """Share of the blocks that rt1 and rt2 hide; default: 0.25."""
    parts: int | None = None
    """Passes of rt3; default: 4."""
    samples: int | None = None
    """Draws of noise and mask per prediction; default: 1."""
    aggregation: str | None = None
    """Of the draws: mean (default) of the logits, or probability."""
    shared_mask: bool = False
    """One mask for the whole batch, as in the official code."""
    method: AtopConfig = field(default_factory=AtopConfig.pretraining)
    loop: FitConfig = field(default_factory=lambda: FitConfig(epochs=40, batch_size=16))

    def run(self) -> None:
        images = in_turn(self.load)
        classifier = load_classifier(self.classifier).to(self.device)
        torch.manual_seed(self.loop.seed)
        defence, origin = self.made(images, classifier)
        _train_defence(self, images, AtopTask(defence, self.method, origin), defence, classifier, "atop")

    def made(self, images: DataSet, classifier: nn.Module) -> tuple[Atop, str]:
        """The defence to train, and what its purifier starts from."""
        chosen, kind = _given(self, *_TRANSFORM), self.purifier or "small_generator"
        if self.weights is None:
            purifier = build_purifier(kind, images.image_shape, width=self.width, residual=self.residual)
            return Atop(classifier, purifier, images.image_shape, **chosen), "scratch"
        if kind != "deepfill" or self.width is not None or self.residual:
            raise ValueError(f"--weights {self.weights} goes with --purifier deepfill, and brings its width")
        purifier = DeepFillGenerator.from_official(self.weights)
        return Atop(classifier, purifier, images.image_shape, **chosen), fingerprint(purifier)


@dataclass(frozen=True)
class TrainAtop(TrainGenerator):
    """Fine-tune a purifier through the frozen classifier, as published or through the pipeline. Resumes."""

    out: Path = Path("runs/atop")
    init: Path | None = Path("runs/generator")
    """A folder that `train generator` or `train atop` wrote; it brings network and transform. None: from scratch."""
    method: AtopConfig = field(default_factory=AtopConfig)

    def made(self, images: DataSet, classifier: nn.Module) -> tuple[Atop, str]:
        if self.init is None:
            return super().made(images, classifier)
        if given := _given(self, "purifier", "width", "residual", "weights", *_TRANSFORM):
            raise ValueError(
                f"--init {self.init} brings its own network and transform; leave out {', '.join(given)}, or start from "
                "scratch with --init None"
            )
        defence = load_atop(self.init, classifier, check=False)  # pre-training saw no classifier
        return defence, fingerprint(defence.purifier)


@dataclass(frozen=True)
class TrainArrest(_Data):
    """Finetune a standardly trained classifier adversarially, near its old representation. Resumes an unfinished run.

    Writes a classifier, which `evaluate` attacks and on which `train carso` and `train atop` build.
    """

    out: Path = Path("runs/arrest")
    classifier: Path | None = None
    """A folder with a standardly trained classifier, by `train classifier`; None: train one first, to OUT/standard."""
    model: str | None = None
    """Without --classifier: small_cnn (default), preact_resnet18, wide_resnet or fully_connected."""
    width: int | None = None
    """Of that classifier, as in `train classifier`."""
    depth: int | None = None
    """Of wide_resnet (28)."""
    standard_epochs: int | None = None
    """Of standard training; default: 100, as a re-implementation of the paper says."""
    layers: tuple[str, ...] = ()
    """Modules whose outputs are the representation; default: the map before pooling."""
    keep_teacher: bool = False
    """Read the old representation of all images once and hold it in memory; not with augmentation."""
    method: ArrestConfig = field(default_factory=ArrestConfig)
    loop: FitConfig = field(default_factory=lambda: FitConfig(epochs=20))

    def run(self) -> None:
        given = _given(self, "model", "width", "depth", "standard_epochs")
        if self.classifier is not None and given:
            raise ValueError(f"--classifier {self.classifier} is trained already: leave out {', '.join(given)}")
        if self.keep_teacher and (self.loop.padding or self.loop.flip):
            raise ValueError("--keep-teacher is for images that are not augmented: leave out --padding and --flip")
        images = in_turn(self.load)
        model = self.start(images)
        task = ArrestTask(model, self.method, images.image_shape, self.layers or None)
        if self.keep_teacher and task.teacher is not None:
            task.teacher.keep(images.x_train, progress=processes()[0] == 0)
        print(fit(task, images.x_train, images.y_train, self.loop, self.out, "arrest"))
        if processes()[0] > 0:
            return
        save_classifier(task.result, self.out)
        eps, norm = self.method.attack.eps, self.method.attack.norm
        report = evaluate(task.result, images.x_test[:], images.y_test, eps=eps, attacks=[], name="arrest")
        print(report.to_text(sys.stdout.isatty()))
        print(self.attacked_by(self.out, eps, norm))

    def fitting(self, model: nn.Module, images: DataSet) -> nn.Module:
        """The classifier, if it fits the images and has the layers: said before anything is trained."""
        layers = self.layers or (representation_before_pooling(model),)
        found = Teacher(model, layers, images.image_shape, self.method.pooled).reader.num_classes
        if images.num_classes > found:
            raise ValueError(f"--data {self.data}: it has {images.num_classes} classes, the classifier {found}")
        return model

    def start(self, images: DataSet) -> nn.Module:
        """The standardly trained classifier."""
        if self.classifier is not None:
            return self.fitting(load_classifier(self.classifier).to(self.device), images)
        torch.manual_seed(self.loop.seed)
        model = self.fitting(_new_classifier(self, images), images)
        loop = replace(self.loop, epochs=100 if self.standard_epochs is None else self.standard_epochs)
        folder = self.out / "standard"
        fit(ClassifierTask(model, ClassifierConfig()), images.x_train, images.y_train, loop, folder, "standard")
        if processes()[0] == 0:
            save_classifier(model, folder)
        return model


@dataclass(frozen=True)
class Ablate(_Data):
    """Adversarial training, finetuning, distillation and replay, each trained and attacked; a table and a plot.

    Resumes; over lists of lambda (--weights) and of the replay's threshold, phi (--angles) or tau (--taus).
    """

    method: tyro.conf.Positional[Literal["arrest"]] = "arrest"
    out: Path = Path("runs/ablation")
    model: str = "small_cnn"
    """small_cnn, preact_resnet18, wide_resnet or fully_connected."""
    width: int | None = None
    """As in `train classifier`."""
    depth: int | None = None
    """Of wide_resnet (28)."""
    what: AblationConfig = field(default_factory=AblationConfig)
    config: ArrestConfig = field(default_factory=ArrestConfig)
    loop: FitConfig = field(default_factory=lambda: FitConfig(epochs=20))

    def run(self) -> None:
        images = self.load()
        made = ablate(lambda: _new_classifier(self, images), images, self.config, self.what, self.loop, self.out)
        print(made[0].read_text())
        print(f"written: {made[0]}, {' and '.join(path.name for path in made[1:])} beside it; rows in folders there")


@dataclass(frozen=True)
class Evaluate(_Data):
    """Attack a saved classifier or defence on held-out images; writes a report with pictures beside it. Resumes."""

    folder: tyro.conf.Positional[Path] = Path("runs/carso")
    eps: float = 0.2
    """Radius in image units."""
    norm: str = "linf"
    images: int = 500
    """Held-out images, the first so many."""
    steps: int = 100
    eot: int = 5
    autoattack: int = 100
    """Images for AutoAttack; 0 leaves it out."""
    also: tuple[Literal["lee_kim_2023", "l2", "l1", "stadv", "classifier"], ...] = ()
    """More attacks: PGD-200 with EOT 20; APGD in the L2 and PGD in the L1 ball; StAdv; the classifier alone (weak)."""
    l2_eps: float = 0.5
    """Radius of the L2 ball of --also l2, in image units."""
    l1_eps: float = 12.0
    """Radius of the L1 ball of --also l1, in image units; 12 is customary on CIFAR-10."""
    batch_size: int = 250
    chunk: int | None = None
    """Images in one forward pass of PGD at most; bounds the memory, exact but for which image gets which draws."""
    seed: int = 0
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 evaluates the accelerated defence, a slightly different function: images are rounded to 8 bits."""
    out: Path | None = None
    """Default: FOLDER/evaluation."""

    def run(self) -> None:
        if "lee_kim_2023" in self.also and self.norm != "linf":
            raise ValueError(f"--also lee_kim_2023 is an L-inf attack at the radius --eps: not with --norm {self.norm}")
        images = self.load()
        kind = read_model(self.folder)[0].get("kind")
        own = kind in {classifier.__name__ for classifier in CLASSIFIERS.values()}
        base = None if own else load_classifier(self.folder / "classifier").to(self.device)
        model = load_classifier(self.folder).to(self.device) if base is None else load(self.folder, base)
        if self.precision == "bfloat16":
            if not isinstance(model, Defence):
                raise ValueError(f"precision bfloat16 is for defences; {self.folder} holds a classifier")
            model.accelerate(torch.bfloat16)
        attacks = [a for a in default_attacks(base) if a.kind != "autoattack" or self.autoattack > 0]
        attacks = [Attack(**{**vars(a), "limit": self.autoattack}) if a.kind == "autoattack" else a for a in attacks]
        more = {
            "lee_kim_2023": lee_kim_2023(self.eps),
            "l2": Attack("apgd", norm="l2", eps=self.l2_eps),
            "l1": Attack("pgd", norm="l1", eps=self.l1_eps),
            "stadv": Attack("stadv"),
            "classifier": Attack(target="classifier"),
        }
        attacks += [more[name] for name in dict.fromkeys(self.also)]
        out = self.folder / "evaluation" if self.out is None else self.out
        report = evaluate(
            model,
            images.x_test[: self.images],
            images.y_test[: self.images],
            eps=self.eps,
            norm=self.norm,
            base=base,
            attacks=attacks,
            steps=self.steps,
            eot=self.eot,
            batch_size=self.batch_size,
            chunk=self.chunk,
            seed=self.seed,
            out=out,
            name=self.folder.name,
        )
        print(report.to_text(sys.stdout.isatty()))
        report.save(out, model)
        print(f"written: {out}/report.md, report.json and pictures")


@dataclass(frozen=True)
class Info:
    """Print versions, the build, and which backend serves which op."""

    def run(self) -> None:
        print(info.report())


@dataclass(frozen=True)
class Train:
    """Train a classifier, or a defence on one; by torchrun on several GPUs or processors."""

    what: (
        Annotated[TrainClassifier, tyro.conf.subcommand("classifier")]
        | Annotated[TrainCarso, tyro.conf.subcommand("carso")]
        | Annotated[TrainGenerator, tyro.conf.subcommand("generator")]
        | Annotated[TrainAtop, tyro.conf.subcommand("atop")]
        | Annotated[TrainArrest, tyro.conf.subcommand("arrest")]
    )

    def run(self) -> None:
        replace(self.what, device=own_device(self.what.device)).run()


Command = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Ablate, tyro.conf.subcommand("ablate")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Info, tyro.conf.subcommand("info")]
)


def _defaults(arguments: list[str]) -> Train | None:
    """The command whose defaults are those of ``--preset NAME``, if that is given."""
    if arguments[:2] != ["train", "carso"]:
        return None
    words = [word for argument in arguments for word in argument.split("=", 1)]
    names = [after for word, after in pairwise(words) if word == "--preset"]
    flags = {word.replace("_", "-") for word in words}  # tyro takes either
    return Train(TrainCarso.of_preset(names[-1], "--official-code" in flags)) if names else None


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, or 2 with one line on stderr for input that cannot be used."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = (tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes)
    keep_memory()
    try:
        given: dict[str, Any] = {"prog": "purify-fast", "args": arguments, "config": options}
        if (defaults := _defaults(arguments)) is not None:
            given["default"] = defaults
        with torchrun_group():
            command = tyro.cli(Command, **given)
            if launched() > 1 and not isinstance(command, Train):
                raise ValueError(f"only train is shared by several processes, here {launched()}: run this in one")
            command.run()
    except (ValueError, FloatingPointError, OSError, ModuleNotFoundError) as error:
        rank = processes()[0]  # of several, another than the first speaks only of an error of its own
        print(f"purify-fast{f', process {rank}' if rank else ''}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("purify-fast: interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
