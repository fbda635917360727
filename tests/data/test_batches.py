import pytest
import torch

from purify_fast.data import batches


def test_every_image_once():
    assert torch.cat(batches(10, 4, 0, 0, drop_last=False)).sort().values.tolist() == list(range(10))
    assert [len(b) for b in batches(10, 4, 0, 0, drop_last=False)] == [4, 4, 2]
    assert [len(b) for b in batches(10, 4, 0, 0)] == [4, 4]
    assert batches(10, 4, 0, 0)[0].dtype == torch.int64


def test_a_function_of_seed_and_epoch():
    def order(*args):
        return torch.cat(batches(100, 10, *args)).tolist()

    assert order(0, 3) == order(0, 3)
    assert len({tuple(order(s, e)) for s in (0, 1, 2**32) for e in (0, 1)}) == 6
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert order(5, 7) == order(5, 7) and torch.equal(before, torch.get_rng_state())


def test_the_order_is_frozen():
    """Runs resume on other machines: the permutation must never change."""
    assert torch.cat(batches(8, 4, 0, 0)).tolist() == [2, 6, 0, 4, 1, 3, 5, 7]


@pytest.mark.parametrize("n", [12, 14])
def test_ranks_take_every_third_image_of_each_batch(n):
    whole = batches(n, 6, 1, 2, drop_last=False)
    for rank in range(3):
        share = batches(n, 6, 1, 2, drop_last=False, rank=rank, world=3)
        assert [part.tolist() for part in share] == [batch[rank::3].tolist() for batch in whole]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n must be"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"batch_size": 21}, "no step"),
        ({"seed": -1}, "seed must be"),
        ({"epoch": -1}, "epoch must be"),
        ({"world": 4}, "multiple of the 4"),
        ({"rank": 2, "world": 2}, "rank must be"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        batches(**{"n": 20, "batch_size": 6, "seed": 0, "epoch": 0} | options)
