"""The examples that kernels are verified with on a GPU, in the interpreter: a right kernel stays clear of its budget.

A GPU adds in another order than the interpreter, so what comes close to a budget here would exceed it on some card.
"""

from __future__ import annotations

import pytest

from purify_fast.ops import REGISTRY, _examples, use_backend
from purify_fast.ops._verify import deviation, double, tensors

#: Take longest in the interpreter: one dtype is run, and of those of attention only the smallest example.
SLOW = ("contextual_attention", "decode_samples", "pgd_step", "random_transform")
OPS = [name for name, op in REGISTRY.items() if op.launch is not None]


@pytest.mark.parametrize("name", OPS)
def test_a_right_kernel_is_clear_of_its_budget(bfloat16_of_a_gpu, name):
    op, shares = REGISTRY[name], {}
    # where bits must agree, each op's own test compares them
    examples = [one for one in _examples.of(name) if not one.exact]
    for example in examples[-1:] if name.startswith("contextual_attention") else examples:
        for dtype in example.dtypes[:1] if name.startswith(SLOW) else example.dtypes:
            arguments = example.make(dtype, 0)
            outputs = tensors(op.launch(*arguments))
            with use_backend("reference"):
                same, golden = (tensors(op.reference(*given)) for given in (arguments, double(arguments)))
            for index, (actual, exact, rounded) in enumerate(zip(outputs, golden, same, strict=True)):
                case = f"{example.name}, {dtype}, output {index}"
                shares[case] = deviation(actual, exact, rounded, example, case).share
    assert max(shares.values(), default=0.0) <= 0.7, max(shares.items(), key=lambda one: one[1])
