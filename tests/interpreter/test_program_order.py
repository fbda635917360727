"""The programs of a launch may run in any order: the bits are the same, and no two programs store to one address."""

import random
import re
import sys
from collections.abc import Iterator
from inspect import getsource

import numpy as np
import op_table
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import strategies as st
from loading import module
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


ORDERS = [
    *((name, 1) for name in OPS if not name.endswith("_backward") and name != "contextual_attention"),
    # Its smallest example takes twenty seconds, and its larger examples twenty minutes.
    pytest.param("contextual_attention", 1, marks=pytest.mark.slow),
    *(pytest.param(n, None, marks=pytest.mark.slow) for n in OPS if not n.startswith("contextual_attention")),
]


@pytest.mark.parametrize(("name", "count"), ORDERS)
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


# -- addresses ---------------------------------------------------------------------------------------------------------
# No kernel reads or writes outside of its tensors. Every launch of this folder's tests is watched (`addresses`).

fuzzing = module("fuzz", "ops")
#: Shapes of images that fill no tile, or a tile and one number more.
ODD = ((1,), (31,), (1023,), (1025,), (3, 7, 5), (1, 33, 31), (2, 1, 129))
#: The functions with Triton kernels, by the names of their ops.
KERNELS = {op: op_table.public_name(op) for op in REGISTRY if REGISTRY[op].launch and not op.endswith("_backward")}
#: Those that draw the shapes of their images by `image_shape`, or by `step`, which calls it.
SHAPED = [op for op in KERNELS if re.search(r"\b(image_shape|step)\(draw\)", getsource(getattr(op_table, KERNELS[op])))]
CASES = [*((op, "of fuzzing") for op in KERNELS), *((op, "odd") for op in SHAPED)]


@triton.jit
def _copy(x_ptr, out_ptr, columns, x_stride, out_stride, READ: tl.constexpr, WRITTEN: tl.constexpr, W: tl.constexpr):
    """Copy a row. The first program also reads number READ of x, and writes number WRITTEN of the result."""
    row, c = tl.program_id(0), tl.arange(0, W)
    x = tl.load(x_ptr + row * x_stride + c, mask=c < columns, other=0.0)
    tl.store(out_ptr + row * out_stride + c, x, mask=c < columns)
    if row == 0:
        tl.store(out_ptr + WRITTEN, tl.load(x_ptr + READ))


def copy(x: Tensor, out: Tensor, read: int = 0, written: int = 0) -> None:
    _copy[(3,)](x, out, 5, x.stride(0), out.stride(0), READ=read, WRITTEN=written, W=8)


def rows(padding: int) -> Tensor:
    """Return three rows of five numbers within a larger tensor, with ``padding`` other numbers after each row."""
    return torch.arange(64.0).as_strided((3, 5), (5 + padding, 1), 7)


#: Where a fault of one element is: the numbers between two rows, and the fault's number.
FAULTS = {"before": (0, -1), "after": (0, 15), "between": (2, 5)}


@pytest.mark.parametrize("turn", [0, 1], ids=["at the end of a page", "at the beginning of a page"])
@pytest.mark.parametrize("does", ["reads", "writes"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_one_element_is_found(addresses, fault, does, turn):
    padding, number = FAULTS[fault]
    x, out = rows(padding), rows(padding)
    # The launches of a kernel take turns, and the second copies to other pages than the first.
    while addresses.launches["test_program_order._copy"] % 2 != turn:
        copy(x, out)
    before = x.clone()
    with pytest.raises(Exception, match=f"_copy {does} 4 bytes at"):
        copy(x, out, **{"read" if does == "reads" else "written": number})
    copy(x, out)
    assert torch.equal(out, before) and torch.equal(x, before)


@pytest.mark.parametrize(("kernel", "sizes"), CASES)
def test_every_shape(backend, bfloat16_of_a_gpu, addresses, monkeypatch, kernel, sizes):
    """Whatever an op accepts: a kernel that reads or writes outside of its tensors raises an error."""
    if sizes == "odd":
        monkeypatch.setattr(op_table, "image_shape", lambda draw: draw(st.sampled_from(ODD)))
    # Small losses on a CPU run PyTorch's operators.
    monkeypatch.setattr(sys.modules["purify_fast.ops.reconstruction_loss"], "SMALLEST", 0)
    name = KERNELS[kernel]
    op, make = op_table.PUBLIC[name], getattr(op_table, name)
    before = sum(addresses.launches.values())

    def tried(data):
        arguments, done = fuzzing.mangled(data.draw, make(data.draw), data.draw(st.integers(0, 1)))
        floats = [key for key, x in arguments.items() if isinstance(x, Tensor) and x.is_floating_point()]
        given = {key: x.detach().requires_grad_() if key in floats else x for key, x in arguments.items()}
        found, refused = fuzzing.called(op, given)
        assert refused is None or done, refused
        outputs = [] if refused else [x for x in fuzzing.tensors(found) if x.requires_grad and not x.is_meta]
        if outputs:
            ones = [torch.ones_like(x) for x in outputs]
            torch.autograd.grad(outputs, [given[key] for key in floats], ones, allow_unused=True)

    fuzzing.fuzzed(tried, share=0.25)()
    assert sum(addresses.launches.values()) > before
