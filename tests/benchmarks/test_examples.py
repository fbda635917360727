"""Every registered op has examples for the tests on a device, and they are of use there."""

import sys

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.gpu import every_op
from purify_fast.ops import REGISTRY
from purify_fast.ops.dispatch import examples as example_tensors


def leaves(arguments) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("op", REGISTRY)
def test_examples_of_every_op(op):
    made = REGISTRY[op].examples
    assert len(made) > 1 and len({example.name for example in made}) == len(made)
    for example in made:
        first, second = (leaves(example.make(example.dtypes[0], seed)) for seed in (0, 1))
        assert [t.shape for t in first] == [t.shape for t in second]  # a captured graph can be given the others
        assert not all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("op", REGISTRY)
def test_tiled_samples_have_tiled_results(op):
    """The batch dimensions are found, those of passes and owners too."""
    example = REGISTRY[op].examples[0]
    small = example.make(torch.float32, 0)
    got = example_tensors.tensors(REGISTRY[op].reference(*example_tensors.tile(small, 2)))
    for out, wanted in zip(got, example_tensors.tensors(REGISTRY[op].reference(*small)), strict=True):
        torch.testing.assert_close(out, example_tensors.tile(wanted, 2))


def test_every_op_runs_once(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["every_op"])
    every_op.main()
    assert f"{len(REGISTRY)} ops" in capsys.readouterr().out
