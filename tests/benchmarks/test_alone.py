import torch
from torch import Tensor, nn

from benchmarks.robustness import alone
from benchmarks.robustness.contests import Subject
from purify_fast.evaluation.request.specs import AttackSpec, as_attack


class Weak(nn.Module):
    """Errs where pixel 0 or 1 is above 0.5; the pixels 2 and 3 say which of the two counts."""

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.flatten(1)
        highest = (pixels[:, :2] * pixels[:, 2:4]).amax(1)
        return torch.stack([0.5 - highest, torch.zeros(len(x))], 1)


def raising(pixel: int, label: str | None = None) -> AttackSpec:
    def attack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        moved = x.clone()
        moved.flatten(1)[:, pixel] += 0.15
        return moved

    return AttackSpec(as_attack(attack), label=label or f"raises pixel {pixel}", survivors_only=True)


def test_what_falls_to_an_attack_alone(monkeypatch):
    x = torch.zeros(6, 1, 2, 2)
    x.flatten(1)[:, :2] = 0.4
    # Two images fall to either attack, one only to the first, two only to the second, and one stands.
    x.flatten(1)[:, 2:] = torch.tensor([[1.0, 1], [1, 1], [1, 0], [0, 1], [0, 1], [0, 0]])
    monkeypatch.setattr(alone, "protocol_attacks", lambda *given: [raising(0), raising(1), raising(1, "again")])
    subject = Subject(Weak(), x, torch.zeros(6, dtype=torch.int64), 0.2)
    found = list(alone.found(subject))
    # The third attack would find what the second finds.
    assert [counts for _, *counts in found] == [[3, 1], [2, 0], [0, 0]]
    monkeypatch.setattr(alone, "protocol_attacks", lambda *given: [raising(0), raising(1)])
    found = list(alone.found(subject))
    assert [counts for _, *counts in found] == [[3, 1], [2, 2]]
    row = {"contest": "weak", "images": 6, "attacks": {name: counts for name, *counts in found}}
    table = alone.markdown([row, row | {"contest": "other"}])
    assert table[0] == "Contests: weak (6 images); other (6 images)."
    assert table[-1] == "| raises pixel 1 | 4 | 4 | weak: 2; other: 2 |"
