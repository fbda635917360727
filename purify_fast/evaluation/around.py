"""What a model has around it that nobody switches for it, and modules inside it that PyTorch does not know of."""

from __future__ import annotations

from collections.abc import Iterable
from types import CodeType

from torch import nn

from ..attacks.held_modules import class_functions, hidden_modules, used_modules
from ..protocols import Classifier

#: Modules that a note names.
_NAMED = 3


def notes_of_modules(model: Classifier, name: str) -> list[str]:
    """Notes about modules in training mode that a model uses and nobody switches, and about those that it hides.

    The mode of a module is switched, and that of its parts; that of a function is not, nor that of a global variable.

    Args:
        model: what is judged, within `purify_fast.attacks.frozen`.
        name: how it is called in the report.
    """
    if not isinstance(model, nn.Module):
        found = _in_training_mode(used_modules(model))
        inside = "give a module in place of the function"
        return [_note_of_modes(f"{name} is a function, and what it uses", found, inside)] if found else []
    hidden = hidden_modules(model)
    switched = {id(part) for whole in (model, *(held for _, held in hidden)) for part in whole.modules()}
    around = (used for used in used_modules(class_functions(model)) if id(used[1]) not in switched)
    found, notes = _in_training_mode(around), []
    if found:
        inside = "make them attributes of the module that uses them"
        notes.append(_note_of_modes(f"what {name} uses besides its own modules", found, inside))
    if hidden:
        notes.append(
            f"{name} holds modules that PyTorch does not know of: "
            f"{_named([f'{where} ({type(held).__name__})' for where, held in hidden])}. Here they were in evaluation "
            "mode, as the rest of the model. But to(), parameters() and state_dict() leave them out: hold them as "
            "attributes, or in nn.ModuleList or nn.ModuleDict"
        )
    return notes


def _note_of_modes(what: str, found: list[str], inside: str) -> str:
    """The note about modules in training mode.

    Args:
        what: what is in training mode.
        found: its modules.
        inside: what else can be done about it.
    """
    return (
        f"{what} is in training mode: {_named(found)}. The numbers are of the model as it is in training. If that is "
        f"not meant, call .eval() on these modules before, or {inside}"
    )


def _named(found: list[str]) -> str:
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return ", ".join(found[:_NAMED]) + more


def _in_training_mode(modules: Iterable[tuple[str, nn.Module]]) -> list[str]:
    """Those that behave as in training, each once."""
    found = {
        f"{where} ({type(part).__name__})": None
        for where, module in modules
        for part in module.modules()
        if part.training and _asks_for_mode(part)
    }
    return list(found)


def _asks_for_mode(module: nn.Module) -> bool:
    """Whether a module computes something else in training, as dropout and batch normalization do."""
    for kind in type(module).__mro__:
        if kind is nn.Module:
            return False
        codes = (getattr(value, "__code__", None) for value in vars(kind).values())
        if any(isinstance(code, CodeType) and "training" in code.co_names for code in codes):
            return True
    return False
