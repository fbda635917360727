"""The attacks as functions: each makes the object of an attack, and runs it on one batch, without an evaluation."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._compiler import outside_graphs
from ..protocols import Classifier
from .attacked_model import called_directly
from .base import Attack
from .context import AttackContext, LossFunction, Radius, Resources, drawn_seed
from .losses import LOSSES
from .search import GradientHealth
from .signatures import check_names, docstring, parameters_of, texts_of

#: The options of attacks with a ``loss``, besides the fields of attack and context.
OF_CALLS = ("generator", "targeted", "mode")


# torch.compile cannot trace how options and context are divided. Compilation begins again inside the attack.
@functools.partial(outside_graphs, recursive=False)
def run_alone(
    attack: type[Attack], model: Classifier, x: Tensor, y: Any = None, eps: Radius | None = None, **options: Any
) -> Tensor:
    """Run an attack without an evaluation.

    If attack and context have an option of the same name, it sets the attack's field; but ``eps`` and ``norm`` of an
    attack in a ball set the context's fields.
    """
    own, shared = _options_of_call(attack)
    health: GradientHealth | None = options.pop("health", None)
    if eps is not None:
        options["eps"] = eps
    check_names(attack.__name__, options, own | shared | dict.fromkeys(OF_CALLS))
    if "eps" in shared and "eps" not in options:
        raise TypeError(f"eps is missing: {attack.__name__} needs a radius in image units, such as eps=8 / 255")
    generator = options.pop("generator", None)
    if options.get("seed") is None:
        options["seed"] = drawn_seed(generator)
    y = _with_loss(attack, x, y, own, options)
    chosen = attack(**{name: options.pop(name) for name in own.keys() & options.keys()})
    context = AttackContext.from_options(**options, counts_health=health is not None)
    with called_directly():
        result = chosen.search(model, x, y, context)
    if health is not None and result.health is not None:
        health.add(**result.health.counts)
    return result.images


def _with_loss(attack: type[Attack], x: Tensor, y: Any, own: dict[str, Any], options: dict[str, Any]) -> Any:
    """Move a loss function, a target and a mode from the options of a call to those of the context, and return y."""
    mode, targeted, loss = options.pop("mode", "eval"), options.pop("targeted", None), options.get("loss", "ce")
    if mode not in ("eval", "keep"):
        raise ValueError(f'mode must be "eval" or "keep", got {mode!r}')
    if mode == "keep" and attack.kind not in ("pgd", "fgsm"):
        raise ValueError(f'mode must be "eval" for {attack.__name__}, got {mode!r}')
    if mode == "keep":
        options["keep_mode"] = True
    if targeted is not None and (callable(loss) or "loss" not in own or loss not in LOSSES):
        raise ValueError(f"targeted needs a loss among {', '.join(LOSSES)}, got {loss!r}")
    if callable(loss):
        if "loss" not in own:
            raise ValueError(f"loss must be a name for {attack.__name__}, got {loss!r}")
        del options["loss"]
        options["loss_function"] = loss if y is not None else functools.partial(_without_y, loss)
        return torch.zeros(len(x), dtype=torch.int64, device=x.device) if y is None else y
    if targeted is not None:
        options.pop("loss", None)
        options["loss_function"] = _towards(loss)
        return targeted
    if y is None:
        raise TypeError("y is missing: give labels, int64 [B], or a function as loss, or targeted")
    return y


def _without_y(loss: LossFunction, logits: Tensor, y: Tensor) -> Tensor:
    return loss(logits, None)


@functools.cache
def _towards(loss: str) -> LossFunction:
    """The loss that grows as the logits come nearer to a target class."""
    return lambda logits, target: -LOSSES[loss](logits, target)


@functools.cache
def _options_of_call(attack: type[Attack]) -> tuple[dict[str, inspect.Parameter], dict[str, inspect.Parameter]]:
    """The options of a call without an evaluation: the attack's fields, and the fields of context and resources."""
    own, shared = parameters_of(attack), parameters_of(AttackContext, Resources)
    for name in ("counts_health", "resources", "loss_function", "keep_mode"):
        del shared[name]
    if attack.norms:
        # The options eps and norm set the context's fields, because only the context's eps may be a tensor.
        del own["eps"], own["norm"]
    return own, {name: option for name, option in shared.items() if name not in own}


def as_function(name: str, attack: type[Attack], returns: str, **defaults: Any) -> Callable[..., Tensor]:
    """Make the function that runs an attack on one batch, with all options and texts of the dataclasses' fields."""

    # Sphinx would look for the defaults of the signature in this line if it had any.
    def call(model: Classifier, x: Tensor, *given: Any, **options: Any) -> Tensor:
        return run_alone(attack, model, x, *given, **{**defaults, **options})

    own, shared = _options_of_call(attack)
    options = {**inspect.signature(run_alone, eval_str=True).parameters}
    del options["attack"], options["options"]
    added: dict[str, Any] = {"generator": None, "health": None}
    if "loss" in own:
        added |= {"targeted": None, "mode": "eval"} | ({"stop_when_fallen": False} if attack.kind == "pgd" else {})
    options |= {key: value for key, value in (own | shared).items() if key != "eps"}
    options |= {
        key: inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=value) for key, value in added.items()
    }
    options |= {option: options[option].replace(default=value) for option, value in {"seed": None, **defaults}.items()}
    call.__name__ = call.__qualname__ = name
    call.__module__ = attack.__module__
    call.__signature__ = inspect.Signature(list(options.values()), return_annotation=Tensor)  # type: ignore[attr-defined]
    of_shared = texts_of(AttackContext, Resources)
    texts = texts_of(attack) | {name: of_shared.get(name, "") for name in shared} | _TEXTS
    call.__doc__ = docstring(
        inspect.cleandoc(attack.__doc__ or "").partition("\n\nArgs:")[0].partition("\n\nRaises:")[0],
        Args=[f"{option}: {texts.get(option, '')}" for option in options],
        Returns=[returns + _SHAPE],
        Raises=_ERRORS,
    )
    return call


_TEXTS = {
    "model": "images ``[B, ...]`` to logits ``[B, classes]``, or to an object or mapping with such ``logits``; a "
    "module is in evaluation mode during the attack.",
    "x": "images, floating point ``[B, ...]`` in [clip_min, clip_max].",
    "y": "true labels, int64 ``[B]``. With a function as loss, y is what the function gets, ``[B, ...]`` or None.",
    "eps": "radius of the ball in image units: a number, ``[B]``, or for PGD and FGSM in linf a tensor that can be "
    "broadcast over the images, such as ``[C, 1, 1]`` for normalized images. alpha, clip_min and clip_max may be such "
    "tensors too.",
    "loss": "a name, or for PGD, FGSM and Auto-PGD a function ``(logits, y) -> [B]`` that is maximized.",
    "targeted": "target classes, int64 ``[B]``. The attack then lowers the loss of these classes, and reads no y.",
    "mode": "eval, or for PGD and FGSM keep, which leaves the model in its mode. BatchNorms in training mode then take "
    "the statistics of the batch, and update their averages in each step. Parameters get no gradients.",
    "generator": "the generator of the seed, if no seed is given; None: torch's generator of the CPU.",
    "seed": "seed of the random numbers; None draws a seed.",
    "stop_when_fallen": "whether an image takes no further steps after a step that misclassifies it.",
    "health": "the counts of faulty gradients and unmoved images are added to it; None: nothing is counted.",
}
_SHAPE = (
    " Shape and dtype are those of x. Up to the rounding of this dtype, the images lie within the radius and within "
    "[clip_min, clip_max]."
)
_ERRORS = (
    "TypeError: x or y is no tensor, there is no such option, a radius is missing, or the model returns no logits.",
    "RuntimeError: an attack with gradients is called within ``torch.inference_mode()``.",
    "ValueError: a shape, dtype, name, count or range that is not allowed, also of the model's output; or a model that "
    "writes to its input.",
)
