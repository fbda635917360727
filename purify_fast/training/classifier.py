"""Trains classifiers on clean images, on PGD examples (Madry et al., ICLR 2018), by TRADES or by MART."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._settings import structure_fingerprint, torch_defaults
from .._version import __version__
from ..models.classifiers import CLASSIFIERS, ForeignClassifier
from ..models.layers import evaluation_mode
from ..ops.philox import Stream, philox, philox_key
from ..speed.frozen_copy import AttackedCopy
from ..speed.layout import autocast_to
from ..speed.reading import reading
from .config import ClassifierConfig, ObjectiveName, TrainingAttack
from .run import read_model, save_model
from .task import Batch, MethodTask, Metrics, check_classifier, settings

#: The weight of the second term in the papers.
BETA = {"trades": 6.0, "mart": 5.0}
#: Standard deviation of the normal random start of TRADES, in image units.
TRADES_START = 1e-3


def divergence(attacked: Tensor, clean: Tensor) -> Tensor:
    """Return KL(softmax(clean) || softmax(attacked)) of each image, ``[B]``, from logits."""
    # With probabilities as the target, the gradient would be NaN where a probability is 0.
    return F.kl_div(F.log_softmax(attacked, 1), F.log_softmax(clean, 1), reduction="none", log_target=True).sum(1)


def trades(clean: Tensor, attacked: Tensor, y: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Return the loss of TRADES, a mean over the images."""
    loss = F.cross_entropy(clean, y, label_smoothing=label_smoothing)
    return loss + beta * divergence(attacked, clean).mean()


def mart(clean: Tensor, attacked: Tensor, y: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Return the loss of MART, a mean over the images. log(1 - q_k) is computed without a cancellation."""
    attacked, label, low = attacked.float(), y[:, None], float("-inf")
    other = attacked.detach().scatter(1, label, low).argmax(1, keepdim=True)
    margin = attacked.logsumexp(1) - attacked.scatter(1, other, low).logsumexp(1)
    boosted = F.cross_entropy(attacked, y, label_smoothing=label_smoothing) + margin.mean()
    p = F.softmax(clean, 1)
    return boosted + beta * (divergence(attacked, clean) * (1 - p.gather(1, label)[:, 0])).mean()


# -- trains classifiers on clean images, on PGD examples (Madry et al., ICLR 2018), by TRADES or by MART ---------------


class ClassifierTask(MethodTask):
    """The training of a classifier on clean or adversarial images, with cross-entropy or the loss of TRADES or MART.

    Args:
        model: the classifier, which maps images ``[B, C, H, W]`` in [0, 1] to logits ``[B, classes]``.
        config: settings of the training.
    """

    attacked: AttackedCopy

    def __init__(self, model: nn.Module, config: ClassifierConfig):
        super().__init__(config, model)
        self.attacked = AttackedCopy(model, self.dtype)
        self.optimizer = self.adamw(model.parameters())

    def training_step(self, batch: Batch) -> tuple[Tensor, Metrics]:
        config = self.config
        return self._loss(batch, config.attack, config.objective, config.label_smoothing or 0.0)

    @torch.no_grad()
    def validate(self, batch: Batch) -> Metrics:
        loss, metrics = self._loss(batch, self.config.attack.of_validations())
        return {"loss": loss, **metrics}

    def _loss(
        self, batch: Batch, attack: TrainingAttack, objective: ObjectiveName | None = None, smoothing: float = 0.0
    ) -> tuple[Tensor, Metrics]:
        x = batch.x
        if sigma := self.config.noise:
            key = philox_key(batch.seed, x.device)
            noise = philox(key, batch.sample_ids, x[0].numel(), stream=Stream.SMOOTHING, distribution="normal")
            x = x + sigma * noise.view(x.shape)
        with autocast_to(x.device, self.dtype):
            attacked = self.attacked.now(x, self.compiles) if attack.eps > 0 else self.model
            if objective == "trades":
                with reading(attacked), evaluation_mode(attacked), torch.no_grad():
                    natural = F.log_softmax(attacked(x), 1)
                if attack.start_std is None and attack.random_start:
                    attack = replace(attack, start_std=TRADES_START)
                x = attack.run(attacked, batch, graphs=self.graphs, loss=divergence, target=natural)
            elif attack.eps > 0:
                x = attack.run(attacked, batch, graphs=self.graphs)
            return self.compiled(self._objective)(x, batch.x, batch.y, objective, smoothing)

    def _objective(
        self, x: Tensor, clean: Tensor, y: Tensor, objective: ObjectiveName | None, smoothing: float
    ) -> tuple[Tensor, Metrics]:
        """Return the loss and the metrics of attacked images ``x`` of the images ``clean``."""
        before = None if objective is None else self.model(clean)
        logits = self.model(x)
        metrics = {"accuracy": (logits.detach().argmax(1) == y).float().mean()}
        if objective is None or before is None:
            return F.cross_entropy(logits, y, label_smoothing=smoothing), metrics
        beta = BETA[objective] if self.config.beta is None else self.config.beta
        return {"trades": trades, "mart": mart}[objective](before, logits, y, beta, smoothing), metrics

    def describe(self) -> dict[str, Any]:
        return {"task": "classifier", **settings(self.config), "structure": structure_fingerprint(self.model)}

    def check(self, shape: tuple[int, ...], classes: int) -> None:
        check_classifier(self.model, shape, classes, self.config.precision)


_KINDS: dict[str, type[nn.Module]] = {kind.__name__: kind for kind in (*CLASSIFIERS.values(), ForeignClassifier)}


def save_classifier(model: nn.Module, folder: str | Path, classes: Sequence[str] | None = None) -> None:
    """Write a classifier to ``model.safetensors``.

    Args:
        model: a classifier of this package, or a `purify_fast.models.classifiers.ForeignClassifier`.
        folder: the folder to write to.
        classes: the names of the classes, such as `purify_fast.data.DataSet.classes`; None: the model's own attribute.

    Raises:
        ValueError: the model is of another class.
    """
    kind = type(model).__name__
    if type(model) is not _KINDS.get(kind):
        raise ValueError(f"model must be one of {', '.join(_KINDS)}, got {kind}: save its state_dict() with torch.save")
    names = getattr(model, "classes", None) if classes is None else classes
    facts = {"classes": list(names)} if names else {}
    save_model(folder, kind, model.arguments, model.state_dict(), **facts)  # type: ignore[arg-type]


def is_classifier(folder: str | Path) -> bool:
    """Return True if a folder of a saved model holds a classifier, and not a defence.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the file is damaged.
    """
    return read_model(folder)[0]["kind"] in _KINDS


def written_by(facts: Mapping[str, Any]) -> str:
    """Words for an error about a saved model that another version of this package wrote; empty for this version."""
    version = facts.get("version", __version__)
    return "" if version == __version__ else f" (purify_fast {version} wrote it, and this is purify_fast {__version__})"


@contextlib.contextmanager
def rebuilding(folder: str | Path, facts: Mapping[str, Any]) -> Iterator[None]:
    """The context in which a saved model is built from its description; errors about its content name the folder."""
    try:
        yield
    except (TypeError, RuntimeError) as error:
        text = " ".join(str(error).split())
        raise ValueError(f"{folder} holds a model that cannot be loaded{written_by(facts)}: {text}") from error


@torch_defaults()
def load_classifier(folder: str | Path) -> nn.Module:
    """Read a classifier that `save_classifier` wrote, in evaluation mode.

    Its attribute ``classes`` has the names of its classes, a tuple, or None if the file does not have them.

    Args:
        folder: folder of the saved classifier. If a user's function made it (``ForeignClassifier``), this imports and
            calls that function: load such a folder only if you trust it.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the file is damaged, or holds another kind of model.
    """
    facts, state = read_model(folder)
    kind = facts["kind"]
    if kind not in _KINDS:
        needs = f"a classifier of a known kind: {', '.join(_KINDS)}"
        raise ValueError(f"{folder} holds a {kind!r}{written_by(facts)}, not {needs}")
    with rebuilding(folder, facts):
        model = _KINDS[kind](**facts["arguments"])
        model.load_state_dict(state)
    vars(model)["classes"] = tuple(facts["classes"]) if "classes" in facts else None
    return model.eval()
