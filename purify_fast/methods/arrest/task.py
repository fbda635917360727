"""ARREST: adversarial finetuning that changes the representation of a standard classifier as little as possible.

Let f and h be the logits and the representation of the classifier, and h* the representation of the teacher, which is a
frozen copy of the classifier as it was before the training. Then

    drift_i = d(h(x_i), h*(x_i))
    x_in    = x + u, u ~ Uniform(-eps, eps), where drift_i > tau in the first half of the epochs   (noisy replay)
            = x', PGD on the cross-entropy, elsewhere                                    (adversarial finetuning)
    L       = CE(f(x_in), y) + lambda mean d(h(x_in), h*(x)),   d = 1 - |cos|            (distillation)

Suzuki et al.: "Adversarial Finetuning with Latent Representation Constraint to Mitigate Accuracy-Robustness Tradeoff",
arXiv 2308.16454 (ICCV 2023). There is no official code; `ArrestConfig` names the source of each number.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..._settings import structure_fingerprint, weights_fingerprint
from ...attacks import frozen
from ...models.layers import Representation
from ...ops.noisy_replay import noisy_replay
from ...ops.philox import philox_key
from ...ops.representation_distance import representation_distance
from ...speed.layout import autocast_to, convert_to_channels_last
from ...training.config import TrainingAttack
from ...training.task import Batch, MethodTask, Metrics, check_classifier, cross_entropy_of

if TYPE_CHECKING:
    from ...speed.frozen_copy import AttackedCopy
    from .method import ArrestConfig


#: Layers that normalize, so that the size of the weights before them hardly matters.
NORMALIZATIONS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def arrest_published(epoch: int, epochs: int, peak: float) -> float:
    """Return ARREST's learning rate in ``epoch``, counted from 0 (arXiv 2308.16454, according to sgmath12/FAT).

    With 20 epochs, the rate is ``peak`` in the first 11 epochs and 0.8 ``peak`` in the next two. Then it halves every
    two epochs: a peak of 0.025 falls to 0.00125. With another number of epochs, the schedule is stretched.
    """
    place = epoch * 20 // epochs
    return peak if place < 11 else 0.8 * peak * 0.5 ** ((place - 11) // 2)


class ArrestTask(MethodTask):
    """The training of a classifier by ARREST, for `purify_fast.training.fit`.

    Args:
        model: the classifier to train in place, images ``[B, *image_shape]`` in [0, 1] to logits. For ARREST it must
            have been trained on clean images.
        config: settings of the training.
        image_shape: (C, H, W).
        layers: paths of the modules whose outputs are the representation. The distances of several layers are averaged.
            None means the map before pooling, for a classifier of this package.
        teacher: classifier whose frozen copy is the teacher. None means ``model`` with its present weights. A run is
            resumed only if the teacher has the same weights.

    Raises:
        ValueError: layers are unknown or missing; or ``pooled`` is True and all layers return vectors.
    """

    name = "arrest"
    attacked: AttackedCopy
    published: ClassVar = {"published": arrest_published}

    def __init__(
        self,
        model: nn.Module,
        config: ArrestConfig,
        image_shape: tuple[int, int, int],
        layers: Sequence[str] | None = None,
        teacher: nn.Module | None = None,
    ):
        # A training by the other methods attacks no copy of this kind, and asks for no name of a layer.
        from ...models.layers import AveragedModel, representation_before_pooling
        from ...speed.frozen_copy import AttackedCopy

        super().__init__(config, model)
        config = self.config
        self.classifier = model
        start = model if teacher is None else teacher
        self.origin = weights_fingerprint(start)
        #: The readers of h* and h; None if neither the distillation nor the replay needs them.
        self.teacher_reader: Representation | None = None
        self._reader: Representation | None = None
        self.layers: list[str] = []
        if config.distillation_weight > 0 or config.replay:
            self.layers = [representation_before_pooling(model, image_shape)] if layers is None else list(layers)
            frozen_copy = copy.deepcopy(start).requires_grad_(False).eval()
            self.teacher_reader = Representation(frozen_copy, self.layers, image_shape)
            if config.pooled and all(len(shape) == 1 for shape in self.teacher_reader.shapes):
                listed = ", ".join(self.layers)
                raise ValueError(f"pooled must be False for layers that return vectors, got True for {listed}")
            if self.dtype != torch.float32:
                # In float32, the teacher remains as it is.
                from ...speed.folding.inference_copy import prepare_for_inference

                prepare_for_inference(frozen_copy, image_shape, self.dtype)
            self._reader = Representation(model, self.layers, image_shape)
        if self.dtype != torch.float32:
            convert_to_channels_last(model, image_shape)
        self.attacked = AttackedCopy(model, self.dtype)
        # The port's rate of SGD is that of a ResNet. Without normalization the weights would diverge.
        normalized = any(isinstance(part, NORMALIZATIONS) for part in model.modules())
        bounded = config.optimizer == "sgd" and not normalized
        self.max_gradient = 1.0 if config.max_gradient is None and bounded else config.max_gradient
        #: The moving average of the weights; it is "average" in the checkpoints.
        self.average = AveragedModel(model, config.ema_decay) if config.ema_decay > 0 else None
        if self.average is not None:
            self.model = nn.ModuleDict({"model": model, "average": self.average})
        weights = [p for p in model.parameters() if p.requires_grad]
        rate, decay = config.learning_rate, config.weight_decay
        if config.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(weights, rate, config.momentum, weight_decay=decay, foreach=True)
        else:
            self.optimizer = self.adamw(weights)

    # -- the parts of a step ------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return logits ``[B, classes]`` and representation of images ``[B, C, H, W]``, in the model's present mode."""
        if self._reader is not None:
            return self._read(self._reader, x)
        with autocast_to(x.device, self.dtype):
            return self.classifier(x), []

    def teacher(self, x: Tensor) -> list[Tensor]:
        """Return the teacher's representation h* of images ``[B, C, H, W]``; an empty list if there is no teacher."""
        with torch.no_grad():
            return [] if self.teacher_reader is None else self._read(self.teacher_reader, x)[1]

    def _read(self, reader: Representation, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        with autocast_to(x.device, self.dtype):
            logits, features = reader.with_logits(x)
        return logits, pool(features) if self.config.pooled else features

    def distance(self, features: list[Tensor], of_teacher: list[Tensor]) -> Tensor:
        """Return the distance d of each image's two representations, ``[B]``, as a mean over the layers."""
        return representation_distance(features, of_teacher, self.config.distance).mean(1)

    @torch.no_grad()
    def drift(self, x: Tensor, of_teacher: list[Tensor]) -> Tensor:
        """Return the drift of clean images ``x``, ``[B]``, with the classifier in the mode ``drift_mode``."""
        with contextlib.nullcontext() if self.config.drift_mode == "train" else frozen(self.classifier):
            return self.distance(self.forward(x)[1], of_teacher)

    def attack(self, batch: Batch, attack: TrainingAttack, rows: Tensor | None = None) -> Tensor:
        """Attack the images with the indices ``rows``, or all images if ``rows`` is None, by PGD on cross-entropy."""
        model = self.attacked.now(batch.x, self.compiles)
        adversarial = attack.run(model, batch, graphs=self.graphs if rows is None else None, rows=rows)
        return adversarial if rows is None else batch.x.index_copy(0, rows, adversarial)

    def inputs(self, batch: Batch, of_teacher: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return x_in, and the share of the images that are replayed (get noise in place of an attack)."""
        attack = self.config.attack
        if not self.config.replays(batch.epoch, batch.epochs):
            return self.attack(batch, attack), batch.x.new_zeros(())
        drift, tau = self.drift(batch.x, of_teacher), self.config.threshold
        replayed = drift > tau
        graphs = self.graphs
        if graphs is not None and graphs.may_capture(batch.x.device) and graphs.refusal is None:
            # A replay of the captured attack takes less time on replayed images too.
            adversarial = self.attack(batch, attack)
        else:
            # The host waits for the device here: it must know whether any image is left to attack.
            rows = torch.nonzero(~replayed)[:, 0]
            adversarial = self.attack(batch, attack, rows) if len(rows) else batch.x
        seed = philox_key(batch.seed, batch.x.device)
        eps = attack.at_epoch(batch.epoch, batch.epochs).eps
        x = noisy_replay(batch.x, adversarial, drift, tau, eps, seed=seed, sample_ids=batch.sample_ids)
        return x, replayed.float().mean()

    def loss(self, x: Tensor, y: Tensor, of_teacher: list[Tensor]) -> tuple[Tensor, Metrics]:
        """Return the loss of inputs ``x [B, C, H, W]``, and metrics."""
        logits, features = self.forward(x)
        cross_entropy, accuracy = cross_entropy_of(logits.float(), y)
        metrics = {"cross_entropy": cross_entropy.detach(), "accuracy": accuracy}
        if self._reader is None:
            return cross_entropy, metrics
        distance = self.distance(features, of_teacher).mean()
        metrics["distance"] = distance.detach()
        return cross_entropy + self.config.distillation_weight * distance, metrics

    def training_step(self, batch: Batch) -> tuple[Tensor, Metrics]:
        of_teacher = self.compiled(self.teacher)(batch.x)
        x, replayed = self.inputs(batch, of_teacher)
        loss, metrics = self.compiled(self.loss)(x, batch.y, of_teacher)
        return loss, {**metrics, "replayed": replayed} if self.config.replay else metrics

    # -- methods that `fit` calls -------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        attack = self.config.attack
        # An alpha of None is replaced by the number that it means. So a run can be resumed with None or that number.
        facts = {"alpha": attack.step_size(attack.eps), "layers": self.layers}
        return {**super().describe(), **facts, "structure": structure_fingerprint(self.classifier)}

    @property
    def result(self) -> nn.Module:
        """The trained classifier; with a moving average, the classifier with the averaged weights."""
        return self.classifier if self.average is None else self.average.module

    def after_step(self) -> None:
        if self.average is not None:
            self.average.update_parameters(self.classifier)

    def check(self, shape: tuple[int, ...], classes: int) -> None:
        check_classifier(self.classifier, shape, classes, self.config.precision)

    def validate(self, batch: Batch) -> Metrics:
        """Return cross-entropy and accuracy under the training's attack, or PGD-10 if it has fewer steps."""
        with autocast_to(batch.x.device, self.dtype):
            x = self.config.attack.of_validations().run(self.result, batch, graphs=self.graphs)
            with torch.no_grad():
                logits = self.result(x).float()
        loss, accuracy = cross_entropy_of(logits, batch.y)
        return {"loss": loss, "accuracy": accuracy}


def pool(features: list[Tensor]) -> list[Tensor]:
    """Average maps ``[B, C, H, W]`` and tokens ``[B, T, D]`` over their positions. Vectors are not changed."""
    return [f.mean((2, 3)) if f.dim() == 4 else f.mean(1) if f.dim() == 3 else f for f in features]
