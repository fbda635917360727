"""The examples of every op: a kernel has the numbers of the definition, and a backward is the derivative."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from op_table import FUNCTIONS
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from purify_fast.ops import REGISTRY, use_backend
from purify_fast.ops.dispatch.examples import ROWS, Example, double, tensors
from purify_fast.ops.dispatch.registry import Op
from purify_fast.ops.dispatch.verify import compare

CPU = torch.device("cpu")
KERNELS = [name for name, op in REGISTRY.items() if op.kernel("cpu") == "cpp"]
#: Those that are not here keep rounded results for their backward, or change what enters the op: their files test them.
BACKWARDS = [name for name in REGISTRY if name.endswith("_backward") and not name.startswith(("decode", "fused"))]
#: Their normals are float32 numbers, which differ by a few units in the last place.
DRAWN = ("philox", "diffusion_step", "random_transform", "sample_latent")
ONE, LONG = ((ROWS, 1),), ((ROWS, 20001),)
#: Shapes, sizes of blocks and numbers of passes.
BLOCKS = (((1, 1, 1), 1, 0), ((2, 64, 32), 32, 2), ((1, 20, 100), 20, 5), ((2, 36, 18), 18, 1))
#: Settings of further examples: a single number, other ends of vectors and of tiles, and blocks of several sizes.
FURTHER = {
    "apgd_step": [(norm, "", (ROWS, 1)) for norm in ("linf", "l2")],
    "gated_elu": [((ROWS, 2), 1), ((ROWS, 4, 3, 4, 5), 1), ((ROWS, 6, 40, 33), 1)],
    "hyperplane_projection": [(norm, (ROWS, 5001)) for norm in ("linf", "l2", "l1")],
    "noisy_replay": [ONE, ((ROWS, 2047),)],
    "pgd_step": [(norm, "", (ROWS, 1)) for norm in ("linf", "l2", "l1")],
    "random_transform": [((ROWS, *a), b, n, 0.25, 2, kind) for a, b, n in BLOCKS for kind in ("", "channels_last")],
    "reconstruction_loss": [ONE, LONG],
    "sample_latent": [ONE, ((ROWS, 1026),)],
    "square_proposal": [
        (norm, (ROWS, *shape), 1, edge)
        for norm in ("linf", "l2", "l1")
        for shape, edge in (((1, 1, 1), 1), ((40, 5, 6), 3), ((2, 50, 30), 11))
    ],
    "stitch": [((ROWS, *shape), grid, 3, "") for shape, grid in (((1, 1, 1), (1, 1)), ((3, 128, 96), (4, 3)))],
}


def examples(name: str) -> list[Example]:
    """The examples of an op, and the further ones, each with the properties of an example of its variant."""
    own = REGISTRY[name].examples

    def further(setting: tuple) -> Example:
        like = next((example for example in own if example.variant == setting[0]), own[0])
        return replace(like, name=str(setting), make=partial(like.make.func, *setting, **like.make.keywords))

    return [*own, *map(further, FURTHER.get(name, ()))]


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_has_the_numbers_of_the_definition(poisoned, name):
    """In its dtypes it is as near to float64 as the definition; in float64 it differs in the last digits at most."""
    op, every = REGISTRY[name], examples(name)
    with use_backend("reference"):
        found = compare(op, CPU, [(example, dtype) for example in every for dtype in example.dtypes])
    assert found.passed, found
    tolerance = 1e-6 if name.startswith(DRAWN) else 1e-10
    for example in every if torch.float32 in every[0].dtypes else ():
        given = double(example.make(torch.float32, 0))
        results = (tensors(function(*given)) for function in (op.handle, torch.no_grad()(op.reference)))
        for kernel, definition in zip(*results, strict=True):
            torch.testing.assert_close(kernel, definition, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", BACKWARDS)
def test_the_definition_of_a_backward_is_the_derivative(name):
    op, backward = REGISTRY[name.removesuffix("_backward")], REGISTRY[name]
    grads = sum(argument.name.startswith("grad") for argument in backward.handle._schema.arguments)
    for example, of_backward in zip(op.examples, backward.examples, strict=True):
        given = tree_map_only(
            Tensor, lambda x: x.requires_grad_() if x.is_floating_point() else x, double(example.make(torch.float64, 0))
        )
        leaves = [x for x in tree_leaves(given) if isinstance(x, Tensor) and x.requires_grad]
        saved = double(of_backward.make(torch.float64, 0))
        found = tensors(backward.reference(*saved))
        outputs = tensors(op.reference(*given))[:grads]
        if example.variant == "vote":
            assert not outputs[0].requires_grad and not found[0].any()
            continue
        wanted = torch.autograd.grad(outputs, leaves[: len(found)], saved[:grads])
        for got, derivative in zip(found, wanted, strict=True):
            torch.testing.assert_close(got, derivative, rtol=1e-9, atol=1e-9 * float(derivative.abs().max()))


# -- gradients through every op ----------------------------------------------------------------------------------------
# Gradients pass through every op as they pass through its definition, unless the op has no backward.


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_pass_through_an_op_as_through_its_definition(name, monkeypatch):
    found = []
    for plain in (True, False):
        monkeypatch.setattr(Op, "uses_reference", lambda *_, plain=plain: plain)
        given = [x.requires_grad_(x.is_floating_point()) for x in FUNCTIONS[name].make(3)]
        with use_backend("reference") if plain else nullcontext():
            outputs = [out.sum() for out in tensors(FUNCTIONS[name].call(*given)) if out.requires_grad]
        if outputs:
            sum(outputs).backward()
        found.append([x.grad for x in given if x.grad is not None])
    by_definition, by_op = found
    assert len(by_definition) == len(by_op) and bool(by_op) == (f"{name.partition(' ')[0]}_backward" in REGISTRY)
    for definition, op in zip(by_definition, by_op, strict=True):
        assert op.any() or name == "aggregate vote"
        torch.testing.assert_close(op, definition, rtol=1e-4, atol=1e-5)
