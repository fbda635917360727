from importlib import import_module

import pytest
import torch

from purify_fast.kernels import _common


def test_dense_starts_where_vectors_do():
    x = torch.arange(40.0)
    for view in (x[1:33], x[4:36], x[::2]):
        dense = _common.dense(view)
        assert torch.equal(dense, view) and dense.is_contiguous() and dense.data_ptr() % 16 == 0
    assert _common.dense(x[4:36]).data_ptr() == x[4:36].data_ptr()


def test_rows_beyond_an_axis(monkeypatch):
    """An axis of a launch holds 65535 programs; here as if it were three."""
    from purify_fast.kernels import philox

    assert [_common.grid(rows, 7) for rows in (1, 65535, 65536)] == [(7, 1, 1), (7, 65535, 1), (7, 32768, 2)]
    # The index of a row is computed in int32.
    assert _common.grid(_common.MOST_ROWS, 1)[2] * _common.grid(_common.MOST_ROWS, 1)[1] < 2**31
    with pytest.raises(ValueError, match=r"at most 2147418112 rows in a call, got 2147418113: divide the call"):
        _common.grid(_common.MOST_ROWS + 1, 1)
    seed, ids = torch.tensor([5]), torch.arange(8)
    whole = philox.forward(seed, ids, 9, 1, 0)
    monkeypatch.setattr(_common, "MOST_PROGRAMS", 3)
    assert _common.grid(8, 7) == (7, 3, 3)  # one program too many
    assert torch.equal(philox.forward(seed, ids, 9, 1, 0), whole)


def test_constants_are_the_references():
    """Those that no example of the ops reaches."""
    constants = {"square_proposal": "TINY", "representation_distance": "LEAST_NORMS LEAST_SQUARE_SINE"}
    for name, of_kernel in {**constants, "pgd_step": "HALVINGS", "aggregate": "TANGENT"}.items():
        kernel, definition = (import_module(f"purify_fast.{place}.{name}") for place in ("kernels", "ops"))
        for one in of_kernel.split():
            wanted = getattr(definition, one)
            assert getattr(kernel, one).value == (wanted[torch.float32] if one == "HALVINGS" else wanted)
