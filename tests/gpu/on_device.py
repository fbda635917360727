"""The device that the tests of this folder run on; without it every file that imports this one is skipped."""

import os

import pytest
import torch

DEVICE = torch.device(os.environ.get("PURIFY_FAST_TEST_DEVICE", "cuda"))
if DEVICE.type == "cuda" and not torch.cuda.is_available():
    pytest.skip("no CUDA device; PURIFY_FAST_TEST_DEVICE=cpu rehearses these tests", allow_module_level=True)
