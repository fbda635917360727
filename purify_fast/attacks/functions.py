"""The attacks as functions: each makes the object of an attack, and runs it on one batch, without an evaluation."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .._compiler import outside_graphs
from ..protocols import Classifier
from .attacked_model import called_directly
from .base import Attack
from .context import AttackContext, Resources
from .search import GradientHealth
from .signatures import check_names, docstring, parameters_of, texts_of


# torch.compile cannot trace how options and context are divided. Compilation begins again inside the attack.
@functools.partial(outside_graphs, recursive=False)
def run_alone(attack: type[Attack], model: Classifier, x: Tensor, y: Tensor, **options: Any) -> Tensor:
    """Run an attack without an evaluation.

    Args:
        attack: the class of the attack.
        model: images to logits.
        x: images ``[B, ...]``.
        y: labels, int64 ``[B]``.
        **options: fields of the attack, of `AttackContext` or of `Resources`. If attack and context have a field of the
            same name, the option sets the attack's field. For an attack in a ball, ``eps`` and ``norm`` set the
            context's fields. ``health`` is a `GradientHealth`, to which the counts are added.

    Returns:
        Adversarial images, shape and dtype of x.

    Raises:
        TypeError: an unknown option, or a missing radius for an attack in a ball.
    """
    own, shared = _options_of_call(attack)
    health: GradientHealth | None = options.pop("health", None)
    check_names(attack.__name__, options, own | shared)
    if "eps" in shared and "eps" not in options:
        raise TypeError(f"eps is missing: {attack.__name__} needs a radius in image units, such as eps=8 / 255")
    chosen = attack(**{name: options.pop(name) for name in own.keys() & options.keys()})
    context = AttackContext.from_options(**options, counts_health=health is not None)
    with called_directly(model, x):
        result = chosen.search(model, x, y, context)
    if health is not None and result.health is not None:
        health.add(**result.health.counts)
    return result.images


@functools.cache
def _options_of_call(attack: type[Attack]) -> tuple[dict[str, inspect.Parameter], dict[str, inspect.Parameter]]:
    """The options of a call without an evaluation: the attack's fields, and the fields of context and resources."""
    own, shared = parameters_of(attack), parameters_of(AttackContext, Resources)
    del shared["counts_health"], shared["resources"]
    if attack.norms:
        # The options eps and norm set the context's fields, because only the context's eps may be a tensor [B].
        del own["eps"], own["norm"]
    return own, {name: option for name, option in shared.items() if name not in own}


def as_function(name: str, attack: type[Attack], returns: str, **defaults: Any) -> Callable[..., Tensor]:
    """Make the function that runs an attack on one batch.

    ``inspect.signature`` and ``help`` show all options of the function: the fields of the attack, of `AttackContext`
    and of `Resources`.

    Args:
        name: the name of the function in the attack's module.
        attack: the class of the attack.
        returns: the sentence about the returned images, for the docstring of the function.
        **defaults: the default values that differ from those of the fields.

    Returns:
        The function.
    """

    def call(model: Classifier, x: Tensor, y: Tensor, **options: Any) -> Tensor:
        return run_alone(attack, model, x, y, **{**defaults, **options})

    own, shared = _options_of_call(attack)
    first = {"eps": shared["eps"].replace(default=inspect.Parameter.empty)} if "eps" in shared else {}
    options = {**inspect.signature(call, eval_str=True).parameters}
    del options["options"]
    health = inspect.Parameter("health", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=GradientHealth | None)
    # The radius comes first in the signature, because every call gives it.
    options |= first | own | shared | first | {"health": health}
    options |= {option: options[option].replace(default=value) for option, value in defaults.items()}
    of_shared = texts_of(AttackContext, Resources)
    texts = texts_of(attack) | {name: of_shared.get(name, "") for name in shared} | _TEXTS
    call.__name__ = call.__qualname__ = name
    call.__module__ = attack.__module__
    call.__signature__ = inspect.Signature(list(options.values()), return_annotation=Tensor)  # type: ignore[attr-defined]
    call.__annotations__ = {option: each.annotation for option, each in options.items()} | {"return": Tensor}
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
    "y": "true labels, int64 ``[B]``.",
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
