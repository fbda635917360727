"""Any function ``(model, x, y) -> x_adv`` as a row of an evaluation; what it returns is checked."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._validation import Norm
from ..attacks import Attack, AttackContext, Run, ThreatModel, frozen
from ..attacks.base import BallAttack
from ..ops.pgd_step import pgd_step
from ..protocols import Classifier

AttackFunction = Callable[[Classifier, Tensor, Tensor], Tensor]
#: How far a value of a float32 image in [0, 1] may be off by rounding: two sums of numbers up to 2, and some room.
ROUNDING = 2.0**-21


def as_attack(
    function: AttackFunction,
    *,
    name: str | None = None,
    eps: float | None = None,
    norm: Norm | None = None,
    revision: str | None = None,
) -> FunctionAttack:
    """A function as an attack, for `evaluate` or an `AttackSpec`.

    Args:
        function: ``(model, x, y) -> x_adv``. It gets a module from images to logits in evaluation mode, float32 images
            ``[B, C, H, W]`` in [0, 1] and int64 labels ``[B]`` on the model's device, with gradients enabled, and must
            return images of the same shape and dtype, in [0, 1] and in the ball. An attack of another package that
            takes ``(x, y)`` fits behind ``lambda model, x, y: PGD(model, eps=8 / 255)(x, y)``.
        name: of the row; the function's own name if None.
        eps: radius of the ball in image units, if it is another than the report's.
        norm: norm of that ball; it needs an eps.
        revision: names what the function computes. Rows of a function without one are made anew by every `evaluate`;
            with one they are kept, so change it whenever the function would find other images. Functions are told
            apart by their module and name: two lambdas, or two functions that one function returned, need revisions
            that differ.

    Raises:
        TypeError: no function.
        ValueError: a name that is empty, or a ball that is not allowed.
    """
    given: Any = function
    if isinstance(given, type) and issubclass(given, Attack):
        raise TypeError(f"{given.__name__} is a class of attacks: write {given.__name__}()")
    if not callable(given):
        raise TypeError(
            "an attack is one of purify_fast.attacks, such as PGD(), an AttackSpec or a function "
            f"(model, x, y) -> x_adv, got {given!r}"
        )
    if name is None:
        name = getattr(function, "__name__", type(function).__name__)
    return FunctionAttack(function=function, row_name=name, eps=eps, norm=norm, own_revision=revision)


@dataclass(frozen=True, kw_only=True)
class FunctionAttack(BallAttack):
    """A function as an attack; made by `as_attack`.

    Args:
        function: ``(model, x, y) -> x_adv``.
        row_name: of the row.
        own_revision: names what the function computes, None: rows are never kept.
    """

    kind: ClassVar[str] = "function"

    function: AttackFunction
    row_name: str
    own_revision: str | None = None

    def __post_init__(self) -> None:
        if not self.row_name:
            raise ValueError("the name of an attack must not be empty")
        super().__post_init__()

    def name(self, context: AttackContext) -> str:
        return self.row_name

    def draws(self, run: Run) -> int:
        """1: the function asks the model as often as it likes."""
        return 1

    def settings(self, context: AttackContext) -> dict[str, Any]:
        norm, eps = self.threat_model(context)
        return {"norm": norm, "eps": eps}

    def revision(self) -> str | None:
        return self.own_revision

    def identity(self) -> list[str]:
        """Module and name of the function, or of the class of an object that is called."""
        function: Any = self.function
        while isinstance(function, functools.partial):
            function = function.func
        named = function if inspect.isroutine(function) else type(function)
        return [str(named.__module__), named.__qualname__]

    def search(self, target: Classifier, x: Tensor, y: Tensor, context: AttackContext) -> Tensor:
        """Call the function on one batch and check what it returns.

        Args:
            target: images to logits.
            x: images ``[B, C, H, W]`` in [0, 1].
            y: labels, int64 ``[B]``.
            context: what the evaluation tells.

        Returns:
            The function's images.

        Raises:
            TypeError: no tensor was returned.
            ValueError: a wrong shape or dtype, NaN, or a point outside [0, 1] or the ball by more than rounding.
        """
        # attacks of other packages switch modes and gradients as they like
        with torch.enable_grad(), frozen(target):
            images = self.function(target, x.clone(), y.clone())
        threat = self.threat_model(context)
        check_adversarial(self.row_name, images, x, threat)
        # what rounding left outside comes back to the border
        return pgd_step(images.detach(), torch.zeros_like(x), x, 0.0, threat.eps, norm=threat.norm)


def check_adversarial(name: str, images: object, x: Tensor, threat: ThreatModel) -> None:
    """Refuse images that an attack was not allowed to return, of the clean images x in [0, 1].

    Of a norm that measures no change of pixels, such as "flow", no radius is checked.

    Raises:
        TypeError: no tensor.
        ValueError: a wrong shape or dtype, NaN, or a point outside [0, 1] or the ball by more than rounding; the
            message says by how much, and what is allowed.
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"the attack {name!r} must return a torch.Tensor, got {type(images).__name__}")
    if images.shape != x.shape or images.dtype != x.dtype or images.device != x.device:
        raise ValueError(
            f"the attack {name!r} must return {x.dtype} images {list(x.shape)} on {x.device}, "
            f"got {images.dtype} {list(images.shape)} on {images.device}"
        )
    images = images.detach()
    if not bool(images.isfinite().all()):
        raise ValueError(f"the attack {name!r} returned {int((~images.isfinite()).sum())} values that are not finite")
    beyond = float(torch.maximum(-images.amin(), images.amax() - 1)) if images.numel() else 0.0
    if beyond > ROUNDING:
        raise ValueError(
            f"the attack {name!r} returned values from {float(images.amin()):.6g} to {float(images.amax()):.6g}: "
            f"{beyond:.3g} outside the allowed range [0, 1]"
        )
    order = {"linf": torch.inf, "l2": 2.0, "l1": 1.0}.get(threat.norm)
    if order is None:
        return
    lengths = torch.linalg.vector_norm((images - x).flatten(1).double(), ord=order, dim=1)
    # of a whole image's rounding errors the norm of the allowed ones
    count = {"linf": 1.0, "l2": x[0].numel() ** 0.5, "l1": float(x[0].numel())}[threat.norm]
    allowed = threat.eps * (1 + 1e-5) + ROUNDING * count
    if len(lengths) and float(lengths.amax()) > allowed:
        worst, length = int(lengths.argmax()), float(lengths.amax())
        raise ValueError(
            f"the attack {name!r} left the ball: image {worst} of the batch is moved by {length:.6g} in the norm "
            f"{threat.norm}, {length - threat.eps:.3g} more than the allowed eps = {threat.eps:.6g}"
        )
