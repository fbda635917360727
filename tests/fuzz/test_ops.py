"""Every public op with arguments of any kind: the definition's result, or a refusal that names an argument. The
tests that pin faults follow."""

import math
import re

import op_table
import pytest
import torch
from hypothesis import reject, strategies as st
from mangling import CONTEXTS, fuzzed, mangled, named, names_of, on_meta, ordinary, tensors
from op_table import PUBLIC
from torch import Tensor

from purify_fast import _library, attacks, ops
from purify_fast.methods.carso import CarsoConfig
from purify_fast.training import ClassifierConfig, FitConfig, TrainingAttack

NO_MEMORY = re.compile("can't allocate memory|storage size calculation overflowed|bad_alloc|invalid shape")


def called(op, arguments: dict):
    """The results of an op, or its refusal."""
    try:
        return op(**arguments), None
    except (ValueError, TypeError) as error:
        return None, error
    except RuntimeError as error:
        # more than any machine has is refused by PyTorch's allocator, which knows no arguments
        if NO_MEMORY.search(str(error)) is None:
            raise
        reject()


def unchanged(now: Tensor, before: Tensor) -> bool:
    return torch.equal(now, before) or bool(((now == before) | ((now != now) & (before != before))).all())


def same(found, wanted, rounding: bool) -> None:
    for one, other in zip(tensors(found), tensors(wanted), strict=True):
        assert (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
        if one.is_meta or not rounding:
            continue
        loose = one.dtype in (torch.bfloat16, torch.float16)
        tolerance = {"rtol": 2e-2, "atol": 2e-2} if loose else {"rtol": 2e-4, "atol": 2e-4}
        torch.testing.assert_close(one, other, equal_nan=True, **tolerance)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", PUBLIC)
@fuzzed
def test_an_op(name, data):
    op, make = PUBLIC[name], getattr(op_table, name)
    arguments, done = mangled(data.draw, make(data.draw), data.draw(st.sampled_from([0, 1, 1, 2])))
    if data.draw(st.integers(0, 11)) == 11:
        arguments = {key: on_meta(value) for key, value in arguments.items()}
        done.append("all: meta")
    context = data.draw(st.sampled_from(sorted(CONTEXTS)))
    with CONTEXTS[context]():
        before = {key: value.clone() for key, value in arguments.items() if isinstance(value, Tensor)}
        found, refused = called(op, arguments)
        if refused is not None:
            assert named(refused, names_of(op)), (done, context, refused)
            assert done, (refused, arguments)
            return
        for key, value in before.items():
            assert value.is_meta or unchanged(arguments[key], value), key
        if _library.loaded():
            with ops.use_backend("reference"):
                wanted, refused = called(op, arguments)
            assert refused is None, (done, context, refused)
            same(found, wanted, ordinary(arguments) and context != "autocast")


# -- faults that fuzzing found -----------------------------------------------------------------------------------------
# Faults that fuzzing found, pinned.


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1, 10**30])
def test_a_seed_that_is_no_int64(seed):
    """It ended in an OverflowError."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
    x, y = torch.rand(2, 1, 2, 2), torch.arange(2)
    with pytest.raises(ValueError, match="seed must be in"):
        attacks.pgd(model, x, y, eps=0.1, alpha=0.1, steps=1, seed=seed)


def test_numbers_that_are_none_in_configurations():
    for make in (
        lambda: FitConfig(1, checkpoint_seconds=math.nan),
        lambda: ClassifierConfig(weight_decay=math.nan),
        lambda: ClassifierConfig(learning_rate=math.inf),
        # It was accepted for an attack with the radius 0.
        lambda: TrainingAttack(eps=0.0, steps=2, alpha=math.nan),
        lambda: CarsoConfig(lookahead_alpha=math.nan),
    ):
        with pytest.raises(ValueError, match=r"(seconds|decay|rate|alpha) must be"):
            make()


def test_labels_on_another_device():
    """The model was run first, and PyTorch's message named no argument."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
    with pytest.raises(ValueError, match="must be on one device, got x on cpu, y on meta"):
        attacks.pgd(model, torch.rand(2, 1, 2, 2), torch.arange(2, device="meta"), eps=0.1, alpha=0.1, steps=1)
