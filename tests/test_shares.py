"""The shares of the slow tests, of which `.ci/run` runs one."""

from dataclasses import dataclass

import pytest
from slow_shares import of_other_shares


@dataclass(frozen=True)
class Item:
    nodeid: str
    slow: bool

    def get_closest_marker(self, name):
        return self if self.slow and name == "slow" else None


ALL = [Item(f"tests/a.py::test[{number}]", number % 3 > 0) for number in range(300)]


def test_every_slow_test_is_in_one_share_and_the_others_are_in_all():
    shares = [set(ALL) - of_other_shares(ALL, f"{number}/8") for number in range(8)]
    for test in ALL:
        assert sum(test in share for share in shares) == (1 if test.slow else 8)
    assert all(10 <= sum(test.slow for test in share) <= 45 for share in shares)


@pytest.mark.parametrize("share", ["8/8", "-1/8", "1", "1/", "/8", "a/b", "0/0"])
def test_another_form_is_refused(share):
    with pytest.raises(pytest.UsageError, match="--slow-share must be K/N with 0 <= K < N"):
        of_other_shares(ALL, share)
