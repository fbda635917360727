"""The examples that verify kernels, in the interpreter: what comes close to a budget here exceeds it on some card."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from loading import module
from torch.utils._pytree import tree_map_only

from purify_fast.ops import REGISTRY, use_backend
from purify_fast.ops.dispatch.verify import compare

#: Ops that take longest in the interpreter. They are slow tests.
SLOW = (
    "contextual_attention",
    "decode_samples",
    "hyperplane_projection",
    "pgd_step",
    "random_transform",
    "square_proposal",
)
examples_of = module("ops", "definitions").examples
#: The ops with a Triton kernel.
NAMES = [name for name, op in REGISTRY.items() if op.launch is not None]


def first_sample(make: Callable[..., tuple]) -> Callable[..., tuple]:
    """Make the first of an example's samples, as the interpreter takes seconds for each of attention's."""
    return lambda *arguments: tree_map_only(torch.Tensor, lambda x: x[:1].contiguous(), make(*arguments))


@pytest.mark.parametrize(
    ("name", "dtypes"),
    [
        *(pytest.param(name, "one", marks=[pytest.mark.slow] * name.startswith(SLOW)) for name in NAMES),
        *(pytest.param(name, "all", marks=pytest.mark.slow) for name in NAMES if not name.startswith(SLOW)),
    ],
)
def test_a_right_kernel_is_clear_of_its_budget(bfloat16_of_a_gpu, poisoned, name, dtypes):
    """Each example in one dtype, in turn, or in all of its dtypes."""
    examples = examples_of(name)
    if dtypes == "one":
        examples = [replace(one, dtypes=(one.dtypes[i % len(one.dtypes)],)) for i, one in enumerate(examples)]
    if name.startswith("contextual_attention"):
        examples = [replace(one, make=first_sample(one.make)) for one in examples]
    # the same comparison as on a GPU, of the launcher that runs there
    launched = replace(REGISTRY[name], handle=REGISTRY[name].launch)
    with use_backend("reference"):
        found = compare(launched, torch.device("cpu"), [(one, dtype) for one in examples for dtype in one.dtypes])
    assert found.share <= 0.7, found
