"""The names and files of version 0.1, which still work in this release; each use of an old name warns once.

This is the only file that knows old names. It imports nothing of the package when it is loaded, so that every part of
the package may use it.
"""

# long because everything that knows an old name is here, to be deleted as a whole with the next release.

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])
C = TypeVar("C")

#: Packages that moved. An attribute of an old package is looked for in these, in order.
MOVED_PACKAGES: dict[str, tuple[str, ...]] = {
    "purify_fast.carso": ("purify_fast.methods.carso",),
    "purify_fast.atop": ("purify_fast.methods.atop",),
    "purify_fast.arrest": ("purify_fast.methods.arrest",),
    "purify_fast.nn": (
        "purify_fast.models",
        "purify_fast.defences",
        "purify_fast.speed",
        "purify_fast.methods.carso",
        "purify_fast.methods.atop",
    ),
}

#: Attributes that have another name in the new packages.
RENAMED_ATTRIBUTES: dict[str, str] = {
    "FrozenView": "InferenceCopy",
    "Head": "WithAggregation",
    "NoisyCopies": "NoisyEnsemble",
    "Purifier": "PurifierAdapter",
    "Randomised": "StochasticDefence",
    "keep_memory": "retain_freed_memory",
}

#: Names that a module no longer has, though it is still there: module, old name, and ``module:name`` of today.
RENAMED_NAMES: dict[str, dict[str, str]] = {
    "purify_fast": {"load": "purify_fast:load_defence"},
    "purify_fast.carso": {"load": "purify_fast.methods.carso:load_carso"},
    "purify_fast.atop": {"load": "purify_fast.methods.atop:load_atop"},
    "purify_fast.training": {"keep_memory": "purify_fast.speed:retain_freed_memory"},
    "purify_fast.attacks": {"Bpda": "purify_fast.attacks:BpdaModel"},
    "purify_fast.data": {"load": "purify_fast.data:load_dataset"},
}


#: Options of the command line by their old names, for each command.
_ATOP_OPTIONS = {
    "attack": "attack-method",
    "missing": "mask-ratio",
    "parts": "num-passes",
    "reconstruction": "reconstruction-weight",
    "warm-up": "cls-delay-epochs",
}
_ARREST_OPTIONS = {
    "average": "ema-decay",
    "awp": "awp-gamma",
    "start": "random-start",
    "warm-up": "eps-warmup",
    "weight": "distillation-weight",
}
RENAMED_OPTIONS: dict[str, dict[str, str]] = {
    "train classifier": {"warm-up": "eps-warmup"},
    "train carso": {"lag": "kl-delay", "reconstruction": "reconstruction-weight"},
    "train generator": _ATOP_OPTIONS,
    "train atop": _ATOP_OPTIONS,
    "train arrest": _ARREST_OPTIONS,
    "ablate": _ARREST_OPTIONS,
    "evaluate": {"chunk": "max-forward-batch", "eot": "eot-iter"},
}
#: Values of options that have another name: by the option's name of today, old value to new.
RENAMED_VALUES: dict[str, dict[str, str]] = {"aggregation": {"probability": "mean_softmax"}}


def warn(old: str, new: str) -> None:
    """Say that ``old`` is now called ``new``."""
    _warn(f"{old} is deprecated and goes in the next release: use {new}")


def _warn(text: str) -> None:
    """A DeprecationWarning that points to the first caller outside of this package: others are hidden by default."""
    level, frame = 2, sys._getframe(1)
    inside = (__package__ or "purify_fast", "contextlib", "dataclasses", "importlib")
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in inside:
        level, frame = level + 1, frame.f_back
    warnings.warn(text, DeprecationWarning, stacklevel=level)


def renamed_arguments(**names: str) -> Callable[[F], F]:
    """A decorator that still takes keyword arguments by their old names, with a warning.

    Args:
        names: old name to new name.

    Raises:
        TypeError: from the decorated function, when both names of an argument are given.
    """

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            for old, new in names.items():
                if old not in kwargs:
                    continue
                if new in kwargs:
                    raise TypeError(f"{function.__qualname__}() got both {new!r} and its old name {old!r}")
                warn(f"the argument {old!r} of {function.__qualname__}()", repr(new))
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return wrapper  # type: ignore[return-value]

    return decorate


def renamed_values(**values: Mapping[str, str]) -> Callable[[F], F]:
    """A decorator that still takes old words as values of keyword arguments, with a warning.

    Args:
        values: per argument, old word to new word.
    """

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            for name in values.keys() & kwargs.keys():
                old = kwargs[name]
                if isinstance(old, str) and old in values[name]:
                    warn(f"{name}={old!r}", f"{name}={values[name][old]!r}")
                    kwargs[name] = values[name][old]
            return function(*args, **kwargs)

        return wrapper  # type: ignore[return-value]

    return decorate


def renamed(
    mapping: Mapping[str, Any], names: Mapping[str, str], values: Mapping[str, Mapping[str, str]] | None = None
) -> dict[str, Any]:
    """A saved file's settings under their new names; the others stay as they are.

    Args:
        mapping: settings by name.
        names: old name to new name.
        values: per new name, old word to new word.
    """
    made = {names.get(name, name): value for name, value in mapping.items()}
    for name, words in (values or {}).items():
        if isinstance(made.get(name), str):
            made[name] = words.get(made[name], made[name])
    return made


#: Backends of version 0.1: the decoder had a kernel in CUDA C++, and has Triton's now.
OLD_BACKENDS = {"cuda": "triton"}
#: What the saved defences of version 0.1 call the arguments of their classes, and words in them.
OLD_CARSO_ARGUMENTS = {"form": "version"}
OLD_ATOP_ARGUMENTS = {"missing": "mask_ratio", "parts": "num_passes"}
OLD_ATOP_VALUES = {"aggregation": {"probability": "mean_softmax"}}


def training_step(package: str, configuration: str, defence: Any, batch: Any, config: Any) -> Any:
    """The method ``training_step`` of the defences of version 0.1: the loss of one batch.

    Args:
        package: the method's package, such as ``purify_fast.methods.carso``.
        configuration: the name of its configuration's class.
        defence: the method's defence.
        batch: a `purify_fast.training.Batch`.
        config: the method's configuration, or None for its defaults.
    """
    method = importlib.import_module(package)
    warn("the method training_step()", f"{package}.training_loss()")
    return method.training_loss(defence, batch, getattr(method, configuration)() if config is None else config)[0]


def renamed_value(argument: str, value: str, names: Mapping[str, str]) -> str:
    """The new name of a mode that is given as a string, with a warning; a value that has no new name as it is.

    Args:
        argument: what takes the mode, as the caller writes it.
        value: the mode that was given.
        names: old name to new name.

    Returns:
        The name that is in use now.
    """
    if value not in names:
        return value
    text = f"{argument}={value!r} is deprecated and goes in the next release: use {names[value]!r}"
    _warn(text)
    return names[value]


#: Settings of trainings, by the kind of training: name in version 0.1 to name now, in the configuration or its attack.
_RENAMED_SETTINGS: dict[str, dict[str, str]] = {
    "classifier": {"warm_up": "eps_warmup"},
    "carso": {"lag": "kl_delay", "reconstruction": "reconstruction_weight"},
    "atop": {
        "attack": "attack_method",
        "warm_up": "cls_delay_epochs",
        "reconstruction": "reconstruction_weight",
    },
    "arrest": {
        "weight": "distillation_weight",
        "average": "ema_decay",
        "awp": "awp_gamma",
        "start": "random_start",
        "warm_up": "eps_warmup",
    },
}
#: Settings that the configurations themselves had, and that their attack has now.
_ATTACK_SETTINGS = ("eps", "norm", "steps", "alpha")


def old_settings(kind: str) -> Callable[[type[C]], type[C]]:
    """A decorator for a training's configuration, which once held the settings of its attack itself.

    The class still takes the old keyword arguments, and gives the old attributes, with a warning. An old name wins over
    the new one, since ``dataclasses.replace(config, eps=0.1)`` gives both.

    Args:
        kind: which training's names these are.
    """

    def decorate(cls: type[C]) -> type[C]:
        initialize = cls.__init__
        fields: Mapping[str, Any] = cls.__dataclass_fields__  # type: ignore[attr-defined]
        own = {old: new for old, new in _RENAMED_SETTINGS[kind].items() if new in fields}
        # what is still a setting, of another meaning, is the old one only where it is a word: attack="pgd"
        word = own.pop("attack", None)
        inside = {old: new for old, new in _RENAMED_SETTINGS[kind].items() if new not in fields}
        inside |= {name: name for name in _ATTACK_SETTINGS}

        @functools.wraps(initialize)
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            if word is not None and isinstance(kwargs.get("attack"), str):
                warn(f"{cls.__name__}(attack={kwargs['attack']!r})", word)
                if word in kwargs:
                    raise TypeError(f"{cls.__name__}() got both {word!r} and its old name 'attack'")
                kwargs[word] = kwargs.pop("attack")
            for old in own.keys() & kwargs.keys():
                warn(f"{cls.__name__}({old}=...)", own[old])
                kwargs[own[old]] = kwargs.pop(old)
            given = {inside[old]: kwargs.pop(old) for old in inside.keys() & kwargs.keys()}
            if given:
                names = ", ".join(f"{name}=..." for name in given)
                warn(f"{cls.__name__} with the attack's own settings", f"attack=TrainingAttack({names})")
                kwargs["attack"] = dataclasses.replace(kwargs.get("attack", fields["attack"].default), **given)
            initialize(self, *args, **kwargs)

        def __getattr__(self: Any, name: str) -> Any:
            if name in inside:
                warn(f"{cls.__name__}.{name}", f"{cls.__name__}.attack.{inside[name]}")
                return getattr(self.attack, inside[name])
            if name in own:
                warn(f"{cls.__name__}.{name}", f"{cls.__name__}.{own[name]}")
                return getattr(self, own[name])
            raise AttributeError(f"{cls.__name__!r} object has no attribute {name!r}")

        cls.__init__ = __init__  # type: ignore[method-assign]
        cls.__getattr__ = __getattr__  # type: ignore[attr-defined]
        return cls

    return decorate


def _found(place: str) -> Any:
    """What ``module:name`` says, imported when it is asked for, because everything else lies above this file."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


#: Settings that version 0.1 did not have, as it did it.
_NEW_SETTINGS: dict[str, Any] = {
    "relative_alpha": 2.5,
    "random_start": True,
    "eps_warmup": 0.0,
    "validation_share": 0.0,
    "validation_every": 1,
    "keep_best": "off",
}


def checkpoint(saved: dict[str, Any]) -> dict[str, Any]:
    """A training's checkpoint in today's form.

    Args:
        saved: a checkpoint of this release or of version 0.1, which had one optimizer without a name.
    """
    kind = saved["facts"]["task"]
    if kind == "classifier":
        # classifiers had no such setting at first
        saved = {**saved, "facts": {"precision": "float32", **saved["facts"]}}
    if kind == "carso":
        # the pipeline's predictions were compared with labels alone at first
        saved = {**saved, "facts": {"targets": "labels", **saved["facts"]}}
    if "optimizers" in saved:
        return saved
    saved = dict(saved)
    own = {"relative_alpha": 2.0} if kind == "classifier" else {}
    facts = _NEW_SETTINGS | own | renamed(saved["facts"], _RENAMED_SETTINGS.get(kind, {}))
    if kind == "carso":
        facts["defence"] = renamed(facts["defence"], OLD_CARSO_ARGUMENTS)
    if kind == "atop":
        facts["defence"] = renamed(facts["defence"], OLD_ATOP_ARGUMENTS, OLD_ATOP_VALUES)
    if kind == "arrest" and facts["alpha"] is None:
        facts["alpha"] = 2.5 * facts["eps"] / facts["steps"]
    saved["facts"] = facts
    names = ("purifier", "discriminator") if kind == "atop" else ("model",)
    saved["optimizers"] = dict(zip(names, _by_group(saved.pop("optimizer"), len(names)), strict=False))
    if kind == "arrest" and facts["ema_decay"] > 0:
        saved["model"] = {
            name.replace("average.", "average.module.", 1) if name.startswith("average.") else name: value
            for name, value in saved["model"].items()
        }
        # once at the start and once a step
        torch = importlib.import_module("torch")
        saved["model"]["average.n_averaged"] = torch.tensor(saved["step"] + 1)
    return {**saved, "best": {}}


def _by_group(state: dict[str, Any], most: int) -> list[dict[str, Any]]:
    """The state of an optimizer of several groups, as of one optimizer for each."""
    groups = state.get("param_groups", [])
    if most == 1 or len(groups) == 1:
        return [state]
    parts = []
    for group in groups:
        own = {index: state["state"][index] for index in group["params"] if index in state["state"]}
        numbers = {index: new for new, index in enumerate(group["params"])}
        parts.append(
            {
                "state": {numbers[index]: value for index, value in own.items()},
                "param_groups": [{**group, "params": list(numbers.values())}],
            }
        )
    return parts


def old_name(module: str, name: str) -> Any:
    """What a module had under this name in version 0.1, with a warning; for a module's ``__getattr__``.

    Args:
        module: the module's ``__name__``.
        name: the attribute that it does not have.

    Raises:
        AttributeError: it never had one of this name.
    """
    if name not in RENAMED_NAMES.get(module, {}):
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    place = RENAMED_NAMES[module][name]
    warn(f"{module}.{name}", place.replace(":", "."))
    return _found(place)


#: The attacks of version 0.1's `evaluation.Attack(kind, ...)`, and their classes in `purify_fast.attacks`.
_ATTACK_CLASSES = {name.lower(): name for name in ("PGD", "APGD", "FGSM", "BPDA", "StAdv", "AutoAttack")}
#: Its options that belong to an `AttackSpec` now, old name to new name.
_SPEC_OPTIONS = {
    "variant": "variant",
    "target": "target",
    "head": "aggregation",
    "label": "label",
    "limit": "max_images",
    "survivors": "survivors_only",
}
#: Its options that belong to the attack, where they have another name.
_ATTACK_OPTIONS = {"eot": "eot_iter", "start": "random_start", "targets": "n_target_classes", "queries": "n_queries"}
#: What they were if not given: such a value was allowed for every attack.
_ATTACK_DEFAULTS = {"restarts": 1, "targets": 9, "queries": 5000, "version": "standard", "start": True}


def old_attack(kind: str = "pgd", **options: Any) -> Any:
    """`evaluation.Attack` of version 0.1, as an `AttackSpec` around one of the attacks of today, with a warning.

    Args:
        kind: ``pgd``, ``apgd``, ``fgsm``, ``bpda``, ``stadv`` or ``autoattack``.
        options: of the attack, or of how it is used, by their old names.

    Raises:
        ValueError: an unknown kind, or an option that it does not have.
    """
    if kind not in _ATTACK_CLASSES:
        raise ValueError(f"kind must be one of {', '.join(_ATTACK_CLASSES)}, got {kind!r}")
    classes = {word: _found(f"purify_fast.attacks:{name}") for word, name in _ATTACK_CLASSES.items()}
    warn(
        f"evaluation.Attack({kind!r}, ...)",
        f"purify_fast.attacks.{_ATTACK_CLASSES[kind]}(...), and AttackSpec around it for options such as the variant",
    )

    def name_in(kind: str, option: str) -> str | None:
        """The option's name in the attack's class, if the class has it."""
        new = "rate" if (kind, option) == ("stadv", "alpha") else _ATTACK_OPTIONS.get(option, option)
        fields = {field.name for field in dataclasses.fields(classes[kind])}
        return new if new in fields else None

    own, around = {}, {}
    for option, value in options.items():
        if option == "head" and kind == "bpda":
            own["aggregation"] = value
        elif option in _SPEC_OPTIONS:
            around[_SPEC_OPTIONS[option]] = value
        elif (new := name_in(kind, option)) is not None:
            # None stood for the attack's own default
            own |= {} if value is None else {new: value}
        elif value != _ATTACK_DEFAULTS.get(option) and (kind, option) != ("autoattack", "loss"):
            kinds = ", ".join(other for other in _ATTACK_CLASSES if name_in(other, option) is not None)
            raise ValueError(f"{option} goes with {kinds or 'no attack'}, not with {kind}")
    return _found("purify_fast.evaluation:AttackSpec")(classes[kind](**own), **around)


def new_options(command: str, words: Sequence[str]) -> list[str]:
    """A command line with the option names of today; each old one warns, visibly for whoever typed it.

    Args:
        command: how the command is called, as in ``train carso``.
        words: the words behind its name.
    """
    options = RENAMED_OPTIONS.get(command, {})
    found: list[str] = []
    with warnings.catch_warnings():
        warnings.filterwarnings("default", "the option", DeprecationWarning)
        for word in words:
            flag, equals, value = word.partition("=")
            name = flag.removeprefix("--").replace("_", "-")
            negation = "no-" if name.startswith("no-") else ""
            if flag.startswith("--") and name.removeprefix("no-") in options:
                new = f"--{negation}{options[name.removeprefix('no-')]}"
                warn(f"the option {flag} of `purify-fast {command}`", new)
                found.append(f"{new}{equals}{value}")
                continue
            # the value of the option before it, or its own
            option = (flag if equals else found[-1] if found else "").removeprefix("--").replace("_", "-")
            old = value if equals else word
            if option in RENAMED_VALUES and old in RENAMED_VALUES[option]:
                new = RENAMED_VALUES[option][old]
                warn(f"the option --{option} {old} of `purify-fast {command}`", f"--{option} {new}")
                found.append(f"{flag}={new}" if equals else new)
                continue
            found.append(word)
    return found


class _MovedPackage(ModuleType):
    """Stands for a package that moved: its attributes are those of the new packages."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in RENAMED_NAMES.get(self.__name__, {}):
            return old_name(self.__name__, name)
        new = RENAMED_ATTRIBUTES.get(name, name)
        for package in MOVED_PACKAGES[self.__name__]:
            module = importlib.import_module(package)
            # a package that imports its names when they are asked for lists them in __all__
            if new in getattr(module, "__all__", ()) or new in vars(module):
                warn(f"{self.__name__}.{name}", f"{package}.{new}")
                return getattr(module, new)
        raise AttributeError(
            f"{self.__name__} has moved to {', '.join(MOVED_PACKAGES[self.__name__])}: no {name!r} there"
        )


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the packages of `MOVED_PACKAGES`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(fullname, self) if fullname in MOVED_PACKAGES else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _MovedPackage(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def install() -> None:
    """Let ``import`` find the packages that moved; called once by ``purify_fast/__init__.py``."""
    if not any(type(finder).__name__ == _Finder.__name__ for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
