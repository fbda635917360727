"""The peak of the memory, by what the system says, and errors that say that it ran out."""

import subprocess
import sys

import pytest

from purify_fast._memory import peak_resident_memory, ran_out_of_memory


@pytest.mark.skipif(sys.platform != "linux", reason="as Linux tells it")
def test_the_peak_is_that_of_this_process():
    size = 600 * 10**6
    held = bytearray(size)
    before = peak_resident_memory()
    # The peak of the process that starts another does not count for the other.
    code = "from purify_fast._memory import peak_resident_memory; print(peak_resident_memory())"
    began = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 10**6 < int(began.stdout) < size
    del held
    # The system counts pages in each thread, and its sum may be some pages off.
    assert abs(peak_resident_memory() - before) < 20 * 10**6
    assert before > size


@pytest.mark.parametrize(
    "error, wanted",
    [
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("Out of memory: 3 bytes"), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("shapes cannot be multiplied"), False),
        (ValueError("not enough memory"), False),
    ],
)
def test_which_errors_are_of_memory(error, wanted):
    assert ran_out_of_memory(error) == wanted
