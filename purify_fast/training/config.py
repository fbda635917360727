"""The settings of trainings: of the loop, of a classifier, and of the attack that makes adversarial examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from .._validation import (
    AtLeast0,
    Count,
    CudaGraphs,
    CudnnBenchmark,
    Norm,
    Positive,
    Precision,
    Range,
    Share,
    ShareBelow1,
    check_types,
    read_norm,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ..attacks.base import Radius
    from ..attacks.objective import LossFunction
    from ..protocols import Classifier
    from ..speed.graphs.graphed_loop import StepGraphs
    from .task import Batch

#: The objectives of a classifier's adversarial training besides cross-entropy.
ObjectiveName = Literal["trades", "mart"]


@dataclass(frozen=True)
class TrainingAttack:
    """The settings of PGD in a training.

    Args:
        eps: radius of the ball in image units (pixels in [0, 1]). 0 trains on clean images, if the method allows it.
        steps: number of PGD steps.
        norm: norm of the ball: "linf", "l2" or "l1".
        alpha: length of a step in image units, at the full eps, at least eps / steps: all steps together must be able
            to reach eps. None means relative_alpha * eps / steps.
        relative_alpha: length of all steps together, as a multiple of eps, at least 1. It is used if alpha is None.
        random_start: whether PGD begins at a random point of the ball instead of the image itself.
        start_std: standard deviation in image units of a normal random start, projected onto the ball. None: uniform.
        eps_warmup: share of the epochs in which eps rises linearly from 0, and alpha with eps. Without a warm-up,
            adversarial training from fresh weights can collapse.

    Raises:
        ValueError: a setting is out of range; the message names it.
    """

    eps: AtLeast0
    steps: Count
    norm: Norm = "linf"
    alpha: Positive | None = None
    relative_alpha: Positive = 2.5
    random_start: bool = True
    start_std: Positive | None = None
    eps_warmup: Share = 0.0

    def __post_init__(self) -> None:
        if (norm := read_norm(self.norm)) != self.norm:
            # A normal assignment would raise an error, because the dataclass is frozen.
            object.__setattr__(self, "norm", norm)
        check_types(self)
        if self.norm == "linf" and not self.eps <= 1:
            needs = "eps must be at most 1 for linf, in image units"
            raise ValueError(f"{needs}, got {self.eps}: is {self.eps:g}/255 meant?")
        if (alpha := self.step_size(self.eps)) * self.steps < self.eps * (1 - 1e-6):
            raise ValueError(f"alpha must be at least eps / steps = {self.eps / self.steps:.4g}, got {alpha:.4g}")
        if self.start_std is not None and not self.random_start:
            raise ValueError(f"start_std needs random_start=True, got start_std={self.start_std}")

    def at_epoch(self, epoch: int, epochs: int) -> TrainingAttack:
        """Return the attack of one epoch, counted from 0, with eps_warmup = 0.

        During the warm-up, eps is smaller; alpha too, if it is given.
        """
        eps = self.eps * min(1.0, (epoch + 1) / (self.eps_warmup * epochs)) if self.eps_warmup else self.eps
        alpha = self.alpha if self.alpha is None or eps == self.eps else self.alpha * eps / self.eps
        return replace(self, eps=eps, alpha=alpha, eps_warmup=0.0)

    def run(
        self,
        model: Classifier,
        batch: Batch,
        *,
        graphs: StepGraphs | None = None,
        rows: Tensor | slice | None = None,
        eps: Tensor | None = None,
        one_step: bool = False,
        loss: LossFunction | None = None,
        target: Tensor | None = None,
    ) -> Tensor:
        """Attack a batch by PGD, or by FGSM if ``one_step``, with the settings of the batch's epoch.

        Args:
            model: the attacked model, images to logits.
            batch: the images, and the seed and sample ids of their random starts.
            graphs: captures the attack's step in a CUDA graph; None captures nothing.
            rows: indices of the images to attack, int64 ``[A]``, or a slice; None for all.
            eps: a radius for each image of the batch, ``[B]``; None for that of the epoch.
            one_step: whether to attack by FGSM, which takes a single step of length eps and has no random start.
            loss: the loss that is maximized, a function ``(logits, target) -> [A]``; None for the cross-entropy.
            target: the second argument of this function; None for the labels.

        Returns:
            The adversarial images ``[A, C, H, W]``.
        """
        # Importing PyTorch takes 1.8 seconds, and the command line's --help must read this class without that wait.
        from ..attacks import FGSM, PGD, AttackContext
        from ..speed.graphs.step_loop import eager_steps

        y = batch.y if target is None else target
        x, y, ids = (part if rows is None else part[rows] for part in (batch.x, y, batch.sample_ids))
        now = self.at_epoch(batch.epoch, batch.epochs)
        radius: Any = now.eps if eps is None else eps if rows is None else eps[rows]
        alpha, random = now.step_size(radius), self.random_start
        pgd = PGD(steps=self.steps, alpha=alpha, random_start=random, start_std=self.start_std, keep_best=False)
        attack = FGSM() if one_step else pgd
        graphs = graphs if graphs is None or graphs.serves(model, x.device) else None
        # Without copies, the attack takes its gradients from the model in the precision that the training has chosen.
        context = AttackContext(
            eps=radius, norm=self.norm, seed=batch.seed, sample_ids=ids, loss_function=loss, graphs=graphs
        )
        with eager_steps(rows is not None and not isinstance(rows, slice)):
            return attack.run(model, x, y, context).images

    def of_validations(self) -> TrainingAttack:
        """Return the attack on held-out images: this attack, or, if it has fewer than 10 steps, PGD-10.

        A model that overfits to an attack with few steps is robust against that attack only.
        """
        return self if self.steps >= 10 or self.eps == 0 else TrainingAttack(eps=self.eps, steps=10, norm=self.norm)

    def step_size(self, eps: Radius) -> Radius:
        """Return the length of a step: alpha if it is given, for any radius; otherwise relative_alpha * eps / steps.

        ``eps`` is a number or ``[B]``, and may differ from this attack's eps.
        """
        return self.relative_alpha * eps / self.steps if self.alpha is None else self.alpha


def check_unused(config: Any, default: Any, names: Sequence[str], needs: str) -> None:
    """Raise ValueError if a setting differs from its default, although it has no effect without ``needs``."""
    for name in names:
        if (value := getattr(config, name)) != getattr(default, name):
            raise ValueError(f"{name} needs {needs}, got {name}={value!r}")


@dataclass(frozen=True)
class FitConfig:
    """The length and the settings of a training loop. The settings of a method are in the method's own config.

    Args:
        epochs: passes over the data.
        batch_size: images per step, of all processes together.
        seed: seed of all random draws.
        padding: width in pixels of a black border that is added before a random crop to the old size. 0 means no crop.
        flip: whether half of the images, drawn at random, are mirrored from left to right.
        drop_last: whether an epoch leaves out a smaller last batch. A DataLoader has its own drop_last.
        steps_per_epoch: steps of an epoch that ends before a whole pass over the data; the next epoch draws from all
            images again, and begins a stream anew. With None, every epoch is a whole pass.
        checkpoint_seconds: seconds between checkpoints within an epoch. The end of an epoch always writes a checkpoint.
        validation_share: share of the images that are held out for validation, by the seed. 0 means no validation.
        validation_every: epochs from one validation to the next. The last epoch always ends with a validation.
        keep_best: the weights that the run returns. "off": those at the end of the run. "loss" and "accuracy": those of
            the validation with the lowest loss or the highest accuracy. A validation uses the training's own attack at
            its full eps, or PGD-10 for a classifier whose attack has fewer steps.
        accumulate: number of parts in which a step computes the gradients of its batch one after the other, to save
            memory. The weights remain equal up to rounding, but BatchNorms take each part's statistics, and the
            published training of CARSO attacks a share of each part. None means 1.
        cuda_graphs: whether the steps of attacks are captured as CUDA graphs, on a CUDA device. "auto" captures a step
            after 15 launches, and "always" before its first. "off" captures nothing. A graph needs the memory of one
            step for itself. Choose "off" if memory runs out beside graphs, and for a model that reads what changes
            outside of its attributes, such as a global variable or the content of a NumPy array: a captured step
            ignores the change.
        compile: whether `torch.compile` compiles what a step computes: the steps of attacks on a copy of the model,
            each as a whole, and the objective with its gradients. The first step then takes minutes for a large
            network, and a further number of images compiles again. Validations compute the objective without the
            compiler. A run that is resumed with the other choice rounds otherwise from there on. It is not for
            several processes whose BatchNorms exchange their statistics.
        cudnn_benchmark: whether cuDNN, on a CUDA device, times its algorithms once for each shape and uses the fastest.
            "auto" does this unless the process requires deterministic algorithms; "on" always does; "off" leaves
            cuDNN's setting unchanged.

    Raises:
        ValueError: a setting is out of range; the message names it.
    """

    epochs: Count
    batch_size: Count = 128
    seed: Annotated[int, Range(0, 2**31, below=True)] = 0
    padding: Annotated[int, Range(0)] = 0
    flip: bool = False
    drop_last: bool = True
    steps_per_epoch: Count | None = None
    checkpoint_seconds: AtLeast0 = 30.0
    validation_share: ShareBelow1 = 0.0
    validation_every: Count = 1
    keep_best: Literal["off", "loss", "accuracy"] = "off"
    accumulate: Count | None = None
    cuda_graphs: CudaGraphs = "auto"
    cudnn_benchmark: CudnnBenchmark = "auto"
    compile: bool = False

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(frozen=True)
class ClassifierConfig:
    """The settings of a classifier's training. This package has chosen every default.

    Args:
        attack: PGD that makes the training examples; eps 0 trains on clean images.
        learning_rate: highest learning rate of a one-cycle schedule.
        weight_decay: weight decay of AdamW.
        precision: "float32", which has the precision of IEEE on a GPU too; "tf32", which on a GPU rounds the factors of
            products to ten bits of mantissa; or "bfloat16" for matrix products. Weights remain in float32.
        objective: loss of an adversarial training. None: cross-entropy on the attacked images. "trades" adds to the
            cross-entropy on the clean images the divergence between both predictions, which its attack maximizes.
            "mart" weights this divergence by how wrong the clean prediction is.
        beta: weight of the divergence. None takes that of the paper: 6 for TRADES, 5 for MART.
        label_smoothing: share of the label that is spread over all classes in the training's cross-entropy. None: 0.
        noise: standard deviation, in image units, of Gaussian noise that is added to the clean images of each step and
            of validations, for `purify_fast.evaluation.certify` (Cohen et al., ICML 2019, section 3.3). None: no noise.

    Raises:
        ValueError: a setting is out of range; the message names it.
    """

    attack: TrainingAttack = TrainingAttack(eps=0.0, steps=7, relative_alpha=2.0, eps_warmup=0.2)
    learning_rate: Positive = 3e-3
    weight_decay: Annotated[float, Range(0, below=True)] = 5e-4
    precision: Precision = "float32"
    objective: ObjectiveName | None = None
    beta: Positive | None = None
    label_smoothing: ShareBelow1 | None = None
    noise: Positive | None = None

    def __post_init__(self) -> None:
        check_types(self)
        if self.noise is not None and self.attack.eps > 0:
            raise ValueError(f"noise needs clean images, eps 0, got noise={self.noise}, eps={self.attack.eps}")
        if self.objective is not None and not self.attack.eps > 0:
            raise ValueError(f"objective {self.objective!r} needs attacked images: eps must be above 0, got 0")
        if self.beta is not None and self.objective is None:
            raise ValueError(f"beta needs the objective trades or mart, got beta={self.beta} without an objective")
