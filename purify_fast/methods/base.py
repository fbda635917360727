"""The base of the methods: published trainings as data, trainings of a purifier, and saved defences."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from .._process import processes
from .._tensors import weights_fingerprint
from ..defences.base import Defence
from ..models.representation import evaluation_mode
from ..training.checkpoint import save_model
from ..training.config import FitConfig, TrainingAttack, settings
from ..training.moving_average import moving_average
from ..training.schedules import one_cycle
from ..training.task import Batch, Task, check_labels

D = TypeVar("D", bound=Defence)
R = TypeVar("R", bound="Recipe")

#: How well a fact is known: read in the authors' code; read in the paper; told by others who read the paper or
#: implemented it again; worked out from facts of the other grades.
Grade = Literal["code", "paper", "second-hand", "inferred"]


@dataclass(frozen=True)
class Fact:
    """A number or choice of a published system.

    Args:
        value: the value that the paper states, or that the authors' code surely means.
        grade: how well it is known.
        source: file and line of the authors' code, or the section of the paper.
        official: the value in the authors' code if it differs; None if it does not.
    """

    value: Any
    grade: Grade
    source: str
    official: Any = None


@dataclass(frozen=True)
class Recipe:
    """All that a published training needs. Each method's subclass makes its objects from it.

    The keys of the facts begin with what they are for: ``data.``, ``classifier.``, ``defence.``, ``method.`` (fields of
    the method's config), ``attack.`` (fields of `purify_fast.training.TrainingAttack`), ``loop.`` (fields of
    `purify_fast.training.FitConfig`), ``start.`` and ``evaluation.``, which are words.

    Args:
        name: name in `purify_fast.methods.recipes.recipe`, such as "carso/cifar10".
        title: the training, in one line.
        facts: by key.
        not_reproduced: the differences of this package, a sentence each.
    """

    #: the method's config
    settings: ClassVar[Any]

    name: str
    title: str
    facts: Mapping[str, Fact]
    not_reproduced: tuple[str, ...] = ()

    def __getitem__(self, key: str) -> Any:
        """A fact's value, by its key."""
        return self.facts[key].value

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images, after they were resized."""
        return self["data.image_shape"]

    def part(self, prefix: str, official_code: bool = False) -> dict[str, Any]:
        """The facts of one part, by their names without it.

        Args:
            prefix: prefix of the keys, such as "loop".
            official_code: take the value in the authors' code if it differs.
        """
        return {
            key.removeprefix(f"{prefix}."): fact.official if official_code and fact.official is not None else fact.value
            for key, fact in self.facts.items()
            if key.startswith(f"{prefix}.")
        }

    def config(self, official_code: bool = False) -> Any:
        """The settings of the training, an object of the method's config.

        Args:
            official_code: reproduce what the authors' code does otherwise than it says or surely means.
        """
        attack = replace(self.settings.attack, **self.part("attack", official_code))
        return self.settings(attack=attack, **self.part("method", official_code))

    def loop(self, official_code: bool = False) -> FitConfig:
        """Epochs, batches and augmentation.

        Args:
            official_code: reproduce what the authors' code does otherwise than it says or surely means.
        """
        return FitConfig(**self.part("loop", official_code))

    def __str__(self) -> str:
        """All facts with grades and sources, and the differences of this package, as text."""
        rows: list[tuple[str, ...]] = [("fact", "value", "official_code=True", "grade", "source")]
        for key, fact in self.facts.items():
            official = "" if fact.official is None else _text(fact.official)
            rows.append((key, _text(fact.value), official, fact.grade, fact.source))
        # a long text would break its column
        widths = [max(len(row[column]) for row in rows if len(row[column]) <= 32) for column in range(4)]
        lines = [f"{self.name}: {self.title}", ""]
        lines += ["  ".join([*map(str.ljust, row[:4], widths), row[4]]) for row in rows]
        if self.not_reproduced:
            lines += ["", "Not reproduced:", *(f"- {sentence}" for sentence in self.not_reproduced)]
        return "\n".join(lines)


def _text(value: Any) -> str:
    """A value as a card shows it."""
    if isinstance(value, tuple) and len(value) > 6:
        return f"{value[0]} ... {value[-1]} ({len(value)})"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def read_recipes(kind: type[R], file: Path) -> dict[str, R]:
    """The recipes of a method, by their names without it.

    Args:
        kind: the method's recipes.
        file: a JSON file in the method's folder. A fact is a list: value, grade, source and, where it differs, what the
            authors' code does. A fraction is a text such as "8/255".
    """
    systems = json.loads(file.read_text(encoding="utf-8"))
    recipes = {}
    for name, system in systems.items():
        facts = {key: Fact(_number(value), *rest) for key, (value, *rest) in system["facts"].items()}
        whole_name = f"{file.parent.name}/{name}"
        recipes[name] = kind(whole_name, system["title"], facts, tuple(system["not_reproduced"]))
    return recipes


def _number(value: Any) -> Any:
    """A value of a file as an object of Python: a fraction as a number, a list as a tuple."""
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, str) and value.replace("/", "", 1).isdigit():
        return float(Fraction(value))
    return value


class MethodTask(Task):
    """A method's training: its precision, its learning rates, and a moving average of the weights.

    Args:
        config: how, a dataclass with ``precision`` and ``learning_rate``, and perhaps a ``schedule``.
    """

    #: the method's name in checkpoints
    name: ClassVar[str]
    #: Learning rates by the schedule's name, functions of the epoch, the number of epochs and the highest rate.
    published: ClassVar[Mapping[str, Callable[[int, int, float], float]]] = {}
    average: AveragedModel | None = None
    averaged: nn.Module

    def __init__(self, config: Any):
        self.config = config
        self.tf32 = config.precision == "tf32"

    def keep_average(self, name: str, module: nn.Module, decay: float, warm_up: bool = False) -> None:
        """Let a moving average follow a module from now on, and keep it in checkpoints beside the model.

        Args:
            name: the model's name there.
            module: the model, or a part of it.
            decay: as in `purify_fast.training.moving_average.moving_average`; 0 for no average.
            warm_up: as there.
        """
        self.averaged = module
        if decay > 0:
            self.average = moving_average(module, decay, warm_up)
            self.model = nn.ModuleDict({name: self.model, "average": self.average})

    @property
    def result(self) -> nn.Module:
        """The trained model: the moving average of its weights if there is one."""
        return self.model if self.average is None else self.average.module

    def after_step(self) -> None:
        """Update the moving average of the weights."""
        if self.average is not None:
            self.average.update_parameters(self.averaged)

    def adamw(self, weights: Iterable[Tensor]) -> torch.optim.Optimizer:
        """AdamW with the rate and the weight decay of the settings."""
        decay = self.config.weight_decay
        return torch.optim.AdamW(weights, lr=self.config.learning_rate, weight_decay=decay, foreach=True)

    def learning_rate(self, progress: float, epoch: int, epochs: int) -> float:
        peak, schedule = self.config.learning_rate, getattr(self.config, "schedule", "one_cycle")
        if schedule in self.published:
            return self.published[schedule](epoch, epochs, peak)
        return peak if schedule == "constant" else one_cycle(progress, peak)


class PurifierTask(MethodTask, Generic[D]):
    """Trains the purifier of a defence; its classifier stays as it is, unless a method says otherwise.

    Args:
        defence: the defence to train.
        config: how; the precision decides whether the defence is accelerated.
        origin: the start of the purifier, if not from scratch; a run is resumed only with the same start.
    """

    def __init__(self, defence: D, config: Any, origin: str):
        super().__init__(config)
        self.defence, self.origin = defence, origin
        self.model = defence
        # the weights at the start: a method may train the classifier too
        self.classifier = weights_fingerprint(defence.classifier)
        # a defence in this precision stays as it is: it may be compiled
        if (config.precision == "bfloat16") != defence.computes_in_bfloat16:
            defence.accelerate(torch.bfloat16 if config.precision == "bfloat16" else None)
        # an earlier task may have released it
        defence.classifier.requires_grad_(False)

    @property
    def result(self) -> D:
        return self.defence

    def describe(self) -> dict[str, Any]:
        facts = {"defence": self.defence.arguments, "classifier": self.classifier}
        return {"task": self.name, **settings(self.config), **facts, "origin": self.origin}

    def attack_facts(self, attack: TrainingAttack) -> dict[str, Any]:
        """The facts that decide, beside the radius, which images the training's attacks on the frozen classifier make.

        Args:
            attack: the attack.

        Raises:
            ValueError: the radius rises from epoch to epoch.
        """
        if attack.eps_warmup:
            raise ValueError(
                f"bank needs one radius for all epochs, and eps_warmup {attack.eps_warmup:g} changes it in the first "
                "epochs: leave eps_warmup out, or train without a bank"
            )
        # the precision of the attacked copy
        facts = {"classifier": self.classifier, "precision": self.config.precision, "task": self.name}
        return facts | {name: value for name, value in asdict(attack).items() if name not in ("eps", "eps_warmup")}

    def finish(self) -> None:
        super().finish()
        self.defence.refresh()

    def check(self, shape: tuple[int, ...], classes: int) -> None:
        if tuple(shape) != self.defence.image_shape:
            raise ValueError(f"x must have images {list(self.defence.image_shape)}, as the defence, got {list(shape)}")
        check_labels(classes, self.defence.num_classes)


def answer_of(argument: str, module: nn.Module, given: str, call: Callable[[], Any]) -> Any:
    """The result of a call of a user's module, in evaluation mode.

    Args:
        argument: the argument that the module was given as, for the message.
        module: the module.
        given: what the call gives to it, for the message.
        call: the call.

    Raises:
        ValueError: the module does not take that.
    """
    try:
        with evaluation_mode(module), torch.no_grad():
            return call()
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{argument}: {type(module).__name__} does not run on {given}: {error}") from error


def description(module: nn.Module, kinds: Mapping[str, type[nn.Module]]) -> dict[str, Any]:
    """JSON values from which a module can be made again; for a module of a user's own only the name of its class.

    Args:
        module: the module.
        kinds: the package's own classes by the names that are saved.
    """
    for name, kind in kinds.items():
        if type(module) is kind:
            return {"kind": name, "arguments": module.arguments}
    return {"kind": type(module).__qualname__, "arguments": None}


def rebuilt(
    facts: Mapping[str, Any], given: nn.Module | None, kinds: Mapping[str, type[nn.Module]], folder: str | Path
) -> nn.Module:
    """The module of a saved `description`, or the given module if it has that description.

    Args:
        facts: the description.
        given: a module of a user's own, or None.
        kinds: the package's own classes by the names that are saved.
        folder: where the description was saved, for the message.

    Raises:
        ValueError: a module is needed and not given, or the given module has another description.
    """
    if given is None:
        if facts["kind"] not in kinds:
            raise ValueError(f"purifier: {folder} holds a {facts['kind']} of yours: give a module of its kind")
        return kinds[facts["kind"]](**facts["arguments"])
    found = description(given, kinds)
    if found["kind"] != facts["kind"] or found["arguments"] not in (None, facts["arguments"]):
        raise ValueError(f"purifier: {folder} holds {dict(facts)}, got {found}")
    return given


def cross_entropy_of(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The cross-entropy of predictions, and their accuracy, detached.

    Args:
        logits: ``[N, classes]``.
        labels: int64 ``[N]``.
    """
    accuracy = (logits.detach().argmax(1) == labels).float().mean()
    return F.cross_entropy(logits, labels), accuracy


def noise_of(defence: Defence, batch: Batch) -> contextlib.AbstractContextManager[Any]:
    """Within the block, the defence's noise is that of the images in the batch of all processes.

    Args:
        defence: whose noise it is.
        batch: this process's share of the batch.
    """
    rank, world = processes()
    return defence.noise_ids(torch.arange(rank, world * len(batch.x), world, device=batch.x.device))


def save_defence(defence: Defence, folder: str | Path) -> None:
    """Write the purifier, and a classifier trained with it; `purify_fast.load_defence` reads them back.

    The file appears whole or not at all. A fingerprint of the classifier is among the facts.

    Args:
        defence: the defence to write.
        folder: the folder to write to; ``model.safetensors`` is written there.
    """
    facts = {"classifier": weights_fingerprint(defence.classifier), "own_classifier": defence.own_classifier}
    facts |= {"acts_from_step": defence.acts_from_step, **({"bank": defence.bank} if defence.bank else {})}
    save_model(folder, type(defence).__name__, defence.arguments, trained_tensors(defence), **facts)


def trained_tensors(defence: Defence) -> dict[str, Tensor]:
    """The tensors of a saved defence: all but those of a frozen classifier."""
    state = defence.state_dict()
    return {
        name: value for name, value in state.items() if defence.own_classifier or not name.startswith("classifier.")
    }
