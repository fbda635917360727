"""No kernel reads or writes outside of its tensors. Every launch of this folder's tests is watched (`addresses`)."""

import re
import sys
from inspect import getsource

import op_table
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import strategies as st
from loading import module
from torch import Tensor

from purify_fast.ops import REGISTRY

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
    while addresses.launches["test_addresses._copy"] % 2 != turn:
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
