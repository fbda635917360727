"""Reads and checks the arguments of `purify_fast.evaluation.evaluate`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any, ParamSpec, TypeVar

from ..._validation import Norm
from ...attacks import Attack, AutoAttack
from ...attacks.arguments import check_eps
from ...attacks.original_autoattack import implementation
from .config import EvaluateConfig
from .specs import AttackFunction, AttackSpec, as_specs

P = ParamSpec("P")
R = TypeVar("R")


def naming_config(call: Callable[P, R]) -> Callable[P, R]:
    """Decorate `evaluate`: if a field of `EvaluateConfig` is given as an argument, the TypeError names the class."""
    apart = {each.name for each in fields(EvaluateConfig)} - inspect.signature(call).parameters.keys()

    @functools.wraps(call)
    def checked(*args: P.args, **options: P.kwargs) -> R:
        given = ", ".join(f"{name}={value!r}" for name, value in options.items() if name in apart)
        if given:
            raise TypeError(f"evaluate has no argument of this name: write config=EvaluateConfig({given})")
        return call(*args, **options)

    return checked


def check_kinds(config: object, base: object) -> None:
    """Raise a TypeError if an argument of `evaluate` is of another kind than documented."""
    if not isinstance(config, EvaluateConfig):
        raise TypeError(f'config must be an EvaluateConfig, such as EvaluateConfig(protocol="fast"), got {config!r}')
    if base is not None and not callable(base):
        raise TypeError(f"base must be a module or a function from images to logits, or None, got {base!r}")


def with_arguments(config: EvaluateConfig, **given: Any) -> EvaluateConfig:
    """The config with the settings that are arguments of `evaluate`; an argument that is None changes nothing."""
    given = {name: value for name, value in given.items() if value is not None}
    for each in fields(config):
        value = getattr(config, each.name)
        if each.name in given and value != each.default:
            raise ValueError(
                f"{each.name} is given twice, as the argument {each.name}={given[each.name]!r} of evaluate and as "
                f"EvaluateConfig({each.name}={value!r}): leave one of the two out"
            )
    return replace(config, **given)


def check_radii(norm: Norm, eps: float, attacks: Sequence[AttackSpec], pixels: int) -> None:
    """Refuse a radius of the evaluation, or of an attack with a radius of its own, whose ball contains every image."""
    check_eps(eps, norm, pixels=pixels)
    for attack in (spec.resolved for spec in attacks):
        own: Any = attack
        if attack.norms and own.eps is not None:
            check_eps(own.eps, own.norm or norm, pixels=pixels)


def read_attacks(
    config: EvaluateConfig, attacks: Sequence[Attack | AttackSpec | AttackFunction] | None, eps: float
) -> tuple[EvaluateConfig, list[AttackSpec]]:
    """Return the config with the protocol that runs (None if attacks are given), and the attacks' specifications."""
    if config.protocol is not None and attacks is not None:
        raise ValueError(
            f"protocol and attacks exclude each other, got protocol={config.protocol!r} and a list of attacks: leave "
            "one of the two out"
        )
    if config.protocol is None and attacks is None:
        config = replace(config, protocol="standard")
    given = [] if attacks is None else as_specs(attacks)
    if config.protocol in ("official", "authors") or any(isinstance(spec.resolved, AutoAttack) for spec in given):
        # If the package is missing, its error is raised here, before any work.
        implementation()
    if eps == 0 and (given or config.protocol or config.probes):
        raise ValueError(
            "eps must be above 0, got 0: no image could be changed. Give the radius of the attacks, such as 8/255; for "
            "the accuracy on clean images only, give attacks=[]"
        )
    return config, given
