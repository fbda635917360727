import math
from importlib import import_module

import pytest
import torch

from purify_fast.ops import Stream, philox

op = import_module("purify_fast.ops.philox")

SEED = torch.tensor([0x0123456789ABCDEF])
IDS = torch.tensor([7, 0, -1, 2**40 + 3])


def as_int32(words: list[int]) -> torch.Tensor:
    return torch.tensor([w - 2**32 if w >= 2**31 else w for w in words], dtype=torch.int32)


VECTORS = [
    ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0xA4093822, 0x299F31D0),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("key", "counter", "expected"), VECTORS, ids=["zeros", "ones", "pi"])
def test_published_vectors(key, counter, expected):
    """The known answers of the Random123 library, on ints and on tensors."""
    assert op.words(key, counter) == expected
    tensors = op.words(tuple(map(torch.tensor, key)), tuple(map(torch.tensor, counter)))
    assert tuple(int(word) for word in tensors) == expected


def test_published_vectors_through_the_op(backend):
    """Counters that the op's layout can reach: all zeros, and ones in every word but the element's."""
    zeros = op.OP.handle if backend != "reference" else op.reference
    bits = zeros(torch.tensor([0]), torch.tensor([0]), 4, 0, 0)
    assert torch.equal(bits.flatten(), as_int32([0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]))
    ones = zeros(torch.tensor([-1]), torch.tensor([-1]), 4, 2**32 - 1, 0, 1, 2**32 - 1)
    expected = op.words((0xFFFFFFFF,) * 2, (0, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF))
    assert torch.equal(ones.flatten(), as_int32(list(expected)))


#: seed 0x0123456789abcdef, sample 7, draw 2, elements 0 to 3. These never change: results depend on them.
PINNED = {
    Stream.LATENT: [0x937D6847, 0x6C6B4B3E, 0xCC82F1AB, 0x9AFF00E9],
    Stream.TRANSFORM_NOISE: [0x61AB81F1, 0xAC684B93, 0xEC23C912, 0x8446E4AD],
    Stream.MASK: [0x000102D8, 0x3FB648C5, 0xB03C58E6, 0x84A9896A],
    Stream.ATTACK_START: [0x3E4C4F96, 0xEFC617A2, 0xB644A650, 0x7AA67725],
    Stream.REPLAY_NOISE: [0x61A56BBB, 0x54B5B554, 0x835B521E, 0x7F179469],
    Stream.AUGMENTATION: [0xD8B20712, 0x5771D999, 0xADDC4AF4, 0x873BF73F],
    Stream.SQUARES: [0xFBA94C5E, 0x5901AB24, 0x4EA8644F, 0xB4DE0ADB],
    Stream.DIFFUSION: [0x3CAAE970, 0x56FD0904, 0xE75E4E63, 0x9B5FAD4E],
    Stream.DIFFUSION_TRAINING: [0xC4916E83, 0x291777CD, 0x60B0BD1A, 0x86DB1056],
    Stream.LOTS: [0xCEE83FE2, 0x6D0FC0DA, 0xFCA6D5A1, 0xE5434CFC],
    Stream.SMOOTHING: [0xB7A4443F, 0x663C1718, 0xABDD6C67, 0x6B874C9B],
}


@pytest.mark.interpreter
@pytest.mark.parametrize("stream", list(Stream), ids=lambda s: s.name)
def test_pinned_vector_of_each_stream(backend, stream):
    assert [*PINNED.values()].count(PINNED[stream]) == 1
    bits = philox(SEED, IDS[:1], 4, stream=stream, distribution="bits", draws=1, first_draw=2)
    assert torch.equal(bits.flatten(), as_int32(PINNED[stream]))


@pytest.mark.interpreter
@pytest.mark.parametrize("distribution", op.DISTRIBUTIONS)
def test_any_split_gives_the_same_numbers(backend, poisoned, distribution):
    arguments = {"stream": Stream.LATENT, "distribution": distribution}
    whole = philox(SEED, IDS, 37, draws=5, **arguments)
    for cut in (1, 2, 3):
        parts = [philox(SEED, ids, 37, draws=5, **arguments) for ids in (IDS[:cut], IDS[cut:])]
        assert torch.equal(torch.cat(parts), whole)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(philox(SEED, IDS[order], 37, draws=5, **arguments), whole[order])
    chunks = [philox(SEED, IDS, 37, draws=n, first_draw=f, **arguments) for f, n in ((0, 2), (2, 1), (3, 2))]
    assert torch.equal(torch.cat(chunks, 1), whole)
    assert torch.equal(philox(SEED, IDS, 30, draws=5, **arguments), whole[..., :30])
    assert torch.equal(philox(SEED, IDS.repeat_interleave(2)[::2], 37, draws=5, **arguments), whole)  # strided ids


def test_uniform_and_normal_distributions(backend):
    ids = torch.arange(64)
    u = philox(SEED, ids, 4096, stream=Stream.MASK, distribution="uniform").flatten().double()
    assert u.min() >= 0 and u.max() < 1
    z = philox(SEED, ids, 4096, stream=Stream.LATENT, distribution="normal").flatten().double()
    assert z.isfinite().all()
    n = z.numel()
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(z.pow(power).mean() - expected) < 5 * math.sqrt(variance / n), f"moment {power}"
    for sample in (u, torch.special.ndtr(z)):  # Kolmogorov and Smirnov: both are uniform if the numbers are right
        ordered, grid = sample.sort().values, torch.arange(n, dtype=torch.float64)
        distance = torch.maximum(ordered - grid / n, (grid + 1) / n - ordered).max()
        assert distance * math.sqrt(n) < 1.95  # p = 0.001
    # neighbours: within a pair of Box and Muller, and from one group of four to the next
    for lag in (1, 2, 3, 4):
        assert abs((z[:-lag] * z[lag:]).mean()) < 5 / math.sqrt(n)
