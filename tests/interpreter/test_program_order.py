"""The programs of a launch may run in any order: the bits are the same, and no two programs store to one address."""

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter

from purify_fast.ops import REGISTRY
from purify_fast.ops.dispatch.examples import Example, tensors
from purify_fast.ops.dispatch.verify import DTYPES

#: The ops with a Triton kernel.
OPS = {name: op for name, op in REGISTRY.items() if op.launch is not None}
#: The largest number of elements in the arguments of an example, as the interpreter is slow.
MOST = 120_000


class Programs:
    """The order in which a launch's programs run, and which of them has stored to each address."""

    def __init__(self) -> None:
        self.shuffled, self.stored, self.twice = False, dict[int, tuple[int, ...]](), 0
        self.order: list[list[int]] = []
        self.now: tuple[int, ...] = ()

    def launch(self, *sizes: int) -> None:
        drawn = random.Random(1)
        self.order = [drawn.sample(range(size), size) if self.shuffled else list(range(size)) for size in sizes]
        # Another launch may store to the same addresses.
        self.stored = {}

    def begin(self, *indices: int) -> tuple[int, ...]:
        self.now = tuple(order[index] for order, index in zip(self.order, indices, strict=True))
        return self.now

    def store(self, addresses: list[int]) -> None:
        self.twice += sum(self.stored.setdefault(address, self.now) != self.now for address in addresses)


@pytest.fixture
def programs(monkeypatch) -> Iterator[Programs]:
    made, builder = Programs(), interpreter.InterpreterBuilder
    set_dim, set_index, store = builder.set_grid_dim, builder.set_grid_idx, builder.create_masked_store

    def dim(self, *sizes):
        made.launch(*sizes)
        return set_dim(self, *sizes)

    def masked_store(self, pointers, value, mask, *rest):
        made.store(np.asarray(pointers.data)[np.asarray(mask.data).astype(bool)].ravel().tolist())
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(builder, "set_grid_dim", dim)
    monkeypatch.setattr(builder, "set_grid_idx", lambda self, *indices: set_index(self, *made.begin(*indices)))
    monkeypatch.setattr(builder, "create_masked_store", masked_store)
    yield made


def in_both_orders(programs: Programs, run) -> tuple[list[Tensor], list[Tensor]]:
    found = []
    for programs.shuffled in (False, True):
        found.append([one.clone() for one in tensors(run())])
    return found[0], found[1]


def made(examples: list[Example]) -> list[tuple[int, str, tuple]]:
    """The examples that verify a kernel on a GPU, in one dtype each, the smallest first: size, name and arguments."""
    found = []
    for example in examples:
        for letter in example.gpu[:1]:
            if DTYPES[letter] in example.dtypes:
                given = example.make(DTYPES[letter], 0)
                size = sum(one.numel() for one in tree_leaves(given) if isinstance(one, Tensor))
                found += [(size, example.name, given)] * (size <= MOST)
    return sorted(found, key=lambda one: one[0])


@pytest.mark.parametrize(
    ("name", "count"),
    [
        *((name, 1) for name in OPS if not name.endswith("_backward") and name != "contextual_attention"),
        # Its smallest example takes twenty seconds, and its larger examples twenty minutes.
        pytest.param("contextual_attention", 1, marks=pytest.mark.slow),
        *(pytest.param(n, None, marks=pytest.mark.slow) for n in OPS if not n.startswith("contextual_attention")),
    ],
)
def test_programs_may_run_in_any_order(programs, name, count):
    examples = made(OPS[name].examples)
    assert examples
    for _, label, given in examples[:count]:
        one, other = in_both_orders(programs, lambda given=given: OPS[name].launch(*given))
        for first, second in zip(one, other, strict=True):
            torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True, msg=label)
        assert programs.stored and programs.twice == 0, label


@triton.jit
def _last(out_ptr, W: tl.constexpr):
    """Every program stores its number to the same addresses."""
    tl.store(out_ptr + tl.arange(0, W), tl.program_id(0) + tl.zeros([W], dtype=tl.int32))


def test_programs_that_store_to_one_address_are_seen(programs):
    out = torch.zeros(4, dtype=torch.int32)

    def run() -> list[Tensor]:
        _last[(5,)](out, W=4)
        return [out]

    (one,), (other,) = in_both_orders(programs, run)
    assert not torch.equal(one, other) and programs.twice == 2 * 4 * 4
