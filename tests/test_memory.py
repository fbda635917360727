"""How much memory is left, by what the system says."""

import subprocess
import sys

import pytest

from purify_fast import _memory
from purify_fast._memory import peak_resident_memory, ran_out_of_memory


def test_control_groups(tmp_path):
    """The limit may be that of any group above, and what files take is given back at once."""

    def group(place, **content):
        folder = tmp_path / "sys/fs/cgroup" / place
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in content.items():
            (folder / name.replace("__", ".")).write_text(text)

    names = tmp_path / "proc/self/cgroup"
    names.parent.mkdir(parents=True)
    names.write_text("0::/a/b\n")
    group("a/b", memory__max="max\n", memory__current="70\n")
    group("a", memory__max="1000\n", memory__current="300\n", memory__stat="anon 1\ninactive_file 100\n")
    assert list(_memory._left_to_groups(tmp_path)) == [800] and list(_memory._left_to_groups(tmp_path / "none")) == []


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
    assert abs(peak_resident_memory() - before) < 20 * 10**6 and before > size


ERRORS = [
    (MemoryError(), True),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"), True),
    (RuntimeError("std::bad_alloc"), True),
    (RuntimeError("Out of memory: 3 bytes"), True),
    (RuntimeError("could not create a primitive"), True),
    (RuntimeError("shapes cannot be multiplied"), False),
    (ValueError("not enough memory"), False),
]


@pytest.mark.parametrize("error, wanted", ERRORS)
def test_which_errors_are_of_memory(error, wanted):
    assert ran_out_of_memory(error) == wanted
