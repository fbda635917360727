"""All kernels compile for two GPUs of AMD. None has run there: this says that Triton's other compiler takes them."""

import os
import re

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.fail("ahead-of-time compilation needs a process without TRITON_INTERPRET=1", pytrace=False)

import torch  # noqa: E402
from ahead import CASES, Device, name_of, run  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402

#: The accelerators MI200 and MI300.
ARCHITECTURES = ("gfx90a", "gfx942")
#: Those that compile in seconds: an elementwise kernel, one with a limit of registers, and one with random numbers.
QUICK = ("gated_elu-forward", "pgd_step-l1-whole-4096", "philox-normal")


class Amd(Device):
    """A replacement for the driver of an AMD GPU, with the facts that the compiler needs."""

    def get_current_target(self):
        return GPUTarget("hip", self.architecture, 64)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("case", [pytest.param(one, marks=() if one in QUICK else pytest.mark.slow) for one in CASES])
def test_compiles_for_amd(monkeypatch, case, architecture):
    """In machine code, and without memory for registers that a thread lacks."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    compiled = triton.JITFunction.run

    def start(*args, **kwargs):
        monkeypatch.setattr(driver, "_active", Amd(architecture))
        return compiled(*args, **kwargs | {"warmup": True})

    kernels = run(case, "bf16", 90, start)
    assert kernels
    for kernel in kernels:
        code = kernel.asm["amdgcn"]
        assert architecture in code and kernel.asm["hsaco"]
        assert re.findall(r"\.vgpr_spill_count:\s+(\d+)", code) == ["0"], name_of(kernel.src.fn)
