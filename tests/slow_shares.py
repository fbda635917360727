"""Equal shares of the slow tests. `.ci/run` runs one share for each commit."""

import zlib

import pytest


def of_other_shares(items: list[pytest.Item], share: str) -> set[pytest.Item]:
    """Return the slow tests that are not in a share."""
    number, _, count = share.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise pytest.UsageError(f"--slow-share must be K/N with 0 <= K < N, got {share!r}")
    slow = {item for item in items if item.get_closest_marker("slow") is not None}
    return {item for item in slow if zlib.crc32(item.nodeid.encode()) % int(count) != int(number)}
