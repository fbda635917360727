import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """The models are tiny: a second thread only spins, many times slower when the machine is shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
