"""Constructors and the command line with values of any kind: refused in their own words, or usable."""

import contextlib
import dataclasses
import functools
import math
import os
import re

import pytest
import torch
from hypothesis import strategies as st
from mangling import NUMBERS, fuzzed, named

from purify_fast import attacks
from purify_fast.cli import _KINDS
from purify_fast.cli.run_file import parse, run_file, values
from purify_fast.methods.arrest import ArrestConfig
from purify_fast.methods.atop import Atop, AtopConfig, SmallGenerator
from purify_fast.methods.carso import Carso, CarsoConfig
from purify_fast.methods.diffusion import Process, Schedule
from purify_fast.models.classifiers import FullyConnected, SmallCNN
from purify_fast.training import ClassifierConfig, FitConfig
from purify_fast.training.config import TrainingAttack

pytestmark = pytest.mark.usefixtures("one_thread")
OF_ATTACKS = "PGD APGD FGSM BPDA StAdv Square FABT AutoAttack BranchAndBound"
CONFIGS = {
    kind.__name__: kind
    for kind in (
        *(ArrestConfig, AtopConfig, CarsoConfig, ClassifierConfig, FitConfig, TrainingAttack, Process, Schedule),
        *(getattr(attacks, name) for name in OF_ATTACKS.split()),
    )
}
NEEDED = {"FitConfig": {"epochs": 2}, "TrainingAttack": {"eps": 0.1, "steps": 2}}


def other_value(draw, value, kind):
    """A value in the place of another of its type."""
    if isinstance(value, bool):
        return not value
    if value is None and not re.search(r"\b(int|float)\b", kind):
        return None
    if isinstance(value, int) or (value is None and "int" in kind):
        return int(draw(st.sampled_from([n for n in NUMBERS if math.isfinite(n)])))
    if isinstance(value, float) or value is None:
        return draw(st.sampled_from(NUMBERS))
    if isinstance(value, str):
        return draw(st.sampled_from(["", "none", value.upper(), "linf", "\0"]))
    if isinstance(value, tuple) and all(isinstance(item, float) for item in value):
        return tuple(draw(st.lists(st.sampled_from([n for n in NUMBERS if n < 1e20 or n != n]), max_size=3)))
    return value


NUMERALS = ("0", "-1", "1", "0.5", "8/255", "8", "1/0", "nan", "inf", "-inf", "1e30", "1,2", "99999999999999999999")
WORDS = ("", "None", "auto", "linf", "L2", "yes", "a b", "/", "../x", "x" * 300, "\u00e4", "--")
VALUES = (*NUMERALS, *WORDS)


def options_of(kind) -> list[str]:
    """Every option of a command, by its name on the command line."""
    return [name.replace("_", "-") for name in values(kind())]


@pytest.mark.parametrize("name", CONFIGS)
@fuzzed
def test_a_configuration(name, data):
    kind, draw = CONFIGS[name], data.draw
    fields = [field for field in dataclasses.fields(kind) if field.init]
    good = kind(**NEEDED.get(name, {}))
    chosen = draw(st.lists(st.sampled_from(fields), min_size=1, max_size=3, unique_by=lambda field: field.name))
    options = {field.name: other_value(draw, getattr(good, field.name), str(field.type)) for field in chosen}
    try:
        made = kind(**{**NEEDED.get(name, {}), **options})
    except (ValueError, TypeError) as error:
        assert named(error, [field.name for field in fields]), (options, error)
        return
    # what is accepted can be shown, compared and copied
    assert repr(dataclasses.replace(made)) == repr(made)
    for field in chosen:
        value = options[field.name]
        if isinstance(value, float) and math.isnan(value):
            raise AssertionError(f"{field.name} is not a number, and accepted: {made}")


#: Defences, and arguments that they take after their networks.
DEFENCES = {
    Carso: {
        **{"layers": ["conv2", "hidden"], "image_shape": (1, 8, 8), "cond_dim": 3, "latent_dim": 2, "samples": 2},
        **{"decoder_width": 1, "encoder_depth": 1, "version": "v4"},
    },
    Atop: {
        **{"image_shape": (1, 8, 8), "transform": "rt2", "sigma": 0.25, "block": 2, "mask_ratio": 0.25},
        **{"num_passes": 2, "samples": 1, "aggregation": "mean", "shared_mask": False},
    },
}
SMALL = (0, 1, -1, 2, 3, 5, 0.5, math.nan, math.inf, -(2**63) - 1, True)


@pytest.mark.parametrize("kind", DEFENCES)
@fuzzed
def test_a_defence(kind, data):
    """A constructor with mangled arguments names one of them in its error, or makes a model with finite logits."""
    draw, good = data.draw, DEFENCES[kind]
    parts = [SmallCNN(1, 4, (8, 8), 2), *([SmallGenerator(1, width=2)] if kind is Atop else [])]
    options = dict(good)
    for name in draw(st.lists(st.sampled_from(sorted(good)), max_size=2, unique=True)):
        value = good[name]
        if name == "image_shape":
            options[name] = tuple(draw(st.lists(st.sampled_from([0, 1, 3, 8, 9, -1]), max_size=4)))
        elif isinstance(value, list):
            options[name] = draw(st.lists(st.sampled_from(["conv1", "conv2", "head", "", "x", "hidden"]), max_size=3))
        elif isinstance(value, str):
            options[name] = draw(st.sampled_from(["", "v1", "v4", "rt1", "rt3", "mean_softmax", "V4"]))
        elif isinstance(value, bool):
            options[name] = not value
        elif isinstance(value, int):
            options[name] = int(draw(st.sampled_from([n for n in SMALL if math.isfinite(n)])))
        else:
            options[name] = draw(st.sampled_from(SMALL))
    try:
        made = kind(*parts, **options)
    except (ValueError, TypeError) as error:
        assert named(error, [*good, "classifier", "purifier", "decoder"]), (options, error)
        return
    with torch.no_grad():
        logits = made(torch.rand(2, *options["image_shape"]))
    assert logits.shape == (2, 4) and bool(logits.isfinite().all()), options


@fuzzed
def test_classifiers(data):
    draw = data.draw
    kind = draw(st.sampled_from([SmallCNN, FullyConnected]))
    size = tuple(draw(st.lists(st.sampled_from([0, 1, 4, 8, 9, -1]), min_size=2, max_size=2)))
    options = {
        "in_channels": draw(st.sampled_from([1, 3, 0, -1])),
        "num_classes": draw(st.sampled_from([2, 10, 1, 0])),
        "image_size": size,
    }
    try:
        made = kind(**options)
    except (ValueError, TypeError) as error:
        assert named(error, [*options, "width", "widths"]), (options, error)
        return
    logits = made.eval()(torch.rand(2, options["in_channels"], *size))
    assert logits.shape == (2, options["num_classes"]) and bool(logits.isfinite().all())


@pytest.mark.parametrize("command", [name for name, kind in _KINDS.items() if options_of(kind)])
@functools.partial(fuzzed, share=0.3)
def test_a_command_line(command, data):
    """It is read, or refused; read lines name a command whose options can be written to a run's file and read again."""
    draw, kind = data.draw, _KINDS[command]
    words = []
    for _ in range(draw(st.integers(1, 3))):
        option, prefix = draw(st.sampled_from(options_of(kind))), draw(st.sampled_from(["--", "--", "--", "--no-"]))
        words += [prefix + option, *draw(st.lists(st.sampled_from(VALUES), max_size=2))]
    with open(os.devnull, "w") as out, contextlib.redirect_stderr(out), contextlib.redirect_stdout(out):
        try:
            made = parse(kind, words)
        except (ValueError, OSError) as error:
            assert str(error) and "Traceback" not in str(error), words
            return
        except SystemExit as stop:
            assert stop.code in (0, 2), words
            return
    assert re.match(r"# purify-fast ", run_file(made))
