"""What `CudaCapture` does where a capture fails, with functions in the place of the device's."""

from __future__ import annotations

import contextlib

import pytest
import torch

from purify_fast.speed.graphs.cuda_capture import CudaCapture

DEVICE, POOL = torch.device("cuda:1"), (0, 7)


@pytest.fixture
def ended(monkeypatch):
    """The pools that the allocator was told to leave; captures end with an error, as they do after a forbidden call."""
    calls: list[tuple] = []

    class Stream:
        def __init__(self, *device):
            pass

        def wait_stream(self, other):
            pass

    @contextlib.contextmanager
    def graph(*given, **settings):
        yield
        raise RuntimeError("operation failed due to a previous error during capture")

    for name, value in {
        "Stream": Stream,
        "CUDAGraph": type("CUDAGraph", (), {"replay": None}),
        "graph_pool_handle": lambda: POOL,
        "current_stream": Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "graph": graph,
        "synchronize": lambda device: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *given: calls.append(given), raising=False)
    return calls


@pytest.mark.parametrize("is_newer", [False, True])
def test_a_failed_capture_leaves_its_pool(ended, monkeypatch, is_newer):
    """Else the allocator of torch 2.11 goes on as in a capture, and never gives freed memory back; a newer one has left
    it already, and says so by an error."""

    def refuses(*given):
        raise RuntimeError("not currently recording to this pool")

    if is_newer:
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", refuses)
    with pytest.raises(RuntimeError, match="previous error during capture"):
        CudaCapture().record(lambda: None, DEVICE)
    assert ended == ([] if is_newer else [(DEVICE.index, POOL)])
