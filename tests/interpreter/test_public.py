"""The public functions with Triton kernels behind them: tests of tests/ops, run once more in the interpreter.

These are the tests with the mark ``interpreter``, of numbers that are special and of small examples. A file with the
mark gives all its tests that take the fixture ``backend``.
"""

from inspect import signature
from pathlib import Path

import pytest
from loading import module
from op_table import FUNCTIONS

from purify_fast.ops import REGISTRY

pytestmark = pytest.mark.usefixtures("bfloat16_of_a_gpu", "backend")
FILES = {path.stem.removeprefix("test_"): path for path in sorted(Path(__file__).parents[1].glob("ops/test_*.py"))}
#: The files with marked tests.
MARKED = [file for file, path in FILES.items() if "pytest.mark.interpreter" in path.read_text()]

for _file in MARKED:
    _module = module("ops", _file)
    _whole = getattr(_module, "pytestmark", None) == pytest.mark.interpreter
    for _name, _test in vars(_module).items():
        _marked = any(mark.name == "interpreter" for mark in getattr(_test, "pytestmark", []))
        if _name.startswith("test_") and (_marked or (_whole and "backend" in signature(_test).parameters)):
            globals()[f"test_{_file}_{_name.removeprefix('test_')}"] = _test


@pytest.fixture
def function(backend, name):
    return FUNCTIONS[name]


def test_every_kernel_has_tests_here():
    """Either tests with the mark, or a file of its own in this folder."""
    own = {path.stem.removeprefix("test_") for path in Path(__file__).parent.glob("test_*.py")}
    launched = {name.removesuffix("_backward") for name, op in REGISTRY.items() if op.launch is not None}
    missing = sorted(launched - own - set(MARKED))
    assert not missing, f"no test in tests/ops/test_{missing[0]}.py has the mark interpreter: docs/extend.md, An op"
