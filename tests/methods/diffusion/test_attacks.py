"""Attacks on a purifier by diffusion: exact gradients, surrogates and ways to predict."""

from dataclasses import asdict, replace

import pytest
import torch
from denoisers import Tiny, defence, images
from evaluating import evaluate
from small_models import Purifying

from purify_fast.attacks import APGD, BpdaModel, LeavingPGD
from purify_fast.attacks.base import ThreatModel
from purify_fast.evaluation import lee_kim_2023
from purify_fast.judge.request.deadline import Subject
from purify_fast.judge.request.preparation import LEE_KIM, PROTOCOLS, protocol_attacks, strong_attacks
from purify_fast.judge.surrogates.copies import Softened, surrogates
from purify_fast.methods.diffusion import Process

SHAPE = (1, 8, 8)
QUIET = {"eps": 0.1, "progress": False, "batch_size": 4}
BALL = ThreatModel("linf", 0.1)


def gradient(model, x, seed=1):
    leaf = x.clone().requires_grad_()
    torch.manual_seed(seed)
    return torch.autograd.grad(model(leaf).square().sum(), leaf)[0]


def test_published_attacks_follow_exact_gradients():
    made, x = defence(SHAPE, process=Process(steps=2), samples=2), images(3, SHAPE)
    with torch.no_grad():
        y = made(x).argmax(1)
    subject = Subject(made, x, y, batch_size=3, n_eval=2, seed=0)
    lee_kim = replace(lee_kim_2023(0.1), attack=replace(lee_kim_2023(0.1).attack, steps=3))
    report = evaluate(made, x, y, **QUIET, steps=2, attacks=[lee_kim, *PROTOCOLS["rand"](subject, BALL)])
    for row in report.rows[1:3]:
        assert row.health["gradients"] > 0 and row.health["zero"] == row.health["nonfinite"] == 0, row.attack


class Rounds(Tiny):
    """A denoiser whose prediction is rounded."""

    def forward(self, x, t):
        return (4 * super().forward(x, t)).round() / 4


def test_softened_copies_reach_into_the_denoiser():
    made, x = defence(SHAPE, Rounds(1), Process(steps=3)), images(3, SHAPE)
    hard, soft = (gradient(model, x) for model in (made, Softened(made, 10.0)))
    # through the process alone, and through the denoiser too
    assert (hard - soft).norm() > 0.01 * hard.norm()
    assert "a straight-through copy" in [name for name, _ in surrogates(made, x, 10, BALL)[0]]


def test_a_denoiser_that_draws_draws_the_same_again():
    class Drops(Tiny):
        def forward(self, x, t):
            return torch.nn.functional.dropout(x, 0.3)

    made, x = defence(SHAPE, Drops(1), Process(solver="ddim", steps=3, clip=False)).double(), images(3, SHAPE).double()
    leaf, ahead = x.clone().requires_grad_(), torch.randn_like(x)

    def purified(z):
        torch.manual_seed(1)
        with made.fixed_noise(0):
            return made.purify(z).square().sum()

    (found,) = torch.autograd.grad(purified(leaf), leaf)
    change = (purified(x + 1e-4 * ahead) - purified(x - 1e-4 * ahead)) / 2e-4
    torch.testing.assert_close((found * ahead).sum(), change.detach())


def test_skipped_gradients_leave_values_as_they_are():
    made, x = defence(SHAPE, process=Process(t_star=0.3, steps=6)), images(4, SHAPE)
    ((_, few), (name, skips), _) = made.attack_surrogates()
    assert name == "a process whose denoiser has a gradient at every step in 4"
    for model, same in ((skips, True), (few, False)):
        torch.manual_seed(1)
        logits = made(x)
        torch.manual_seed(1)
        assert torch.equal(model(x), logits) == same
        assert not torch.allclose(gradient(model, x), gradient(made, x))
    skips.followed = [True] * len(skips.begins)
    assert torch.equal(gradient(skips, x), gradient(made, x))
    # without any gradient of the denoiser a step of DDIM is linear in the state
    ddim = made.with_process(Process(solver="ddim", t_star=0.3, steps=6, clip=False))
    ddim.followed = [False] * len(ddim.begins)
    torch.testing.assert_close(gradient(ddim, x), gradient(BpdaModel.of(ddim), x), rtol=1e-4, atol=1e-7)


def test_one_step_has_no_shorter_form():
    assert defence(SHAPE, process=Process(solver="one_shot")).attack_surrogates() == []
    names = [name for name, _ in defence(SHAPE, process=Process(steps=3)).attack_surrogates()]
    assert names == ["a process whose denoiser has a gradient at every step in 4", "one step in place of its process"]


def test_strong_tries_them_by_itself():
    made, x = defence(SHAPE, process=Process(steps=5)), images(2, SHAPE)
    names = [name for name, _ in surrogates(made, x, 10, BALL)[0]]
    wanted = {"classifier alone", "a copy without noise", "a copy with fixed noise", "a process of fewer steps"}
    wanted |= {"a copy whose purifier is the identity backward", "one step in place of its process"}
    assert wanted | {"a process whose denoiser has a gradient at every step in 4"} <= set(names)


def test_strong_adds_what_the_field_attacks_such_purifiers_with():
    made, x = defence(SHAPE, process=Process(steps=2)), images(2, SHAPE)
    subject = Subject(made, x, torch.zeros(2, dtype=torch.int64), batch_size=2, n_eval=2, seed=0)
    specs = {spec.label: spec for spec in protocol_attacks("strong", subject, BALL)}
    lee_kim = next(spec for label, spec in specs.items() if label and label.startswith(LEE_KIM))
    assert isinstance(lee_kim.attack, LeavingPGD) and lee_kim.survivors_only
    published = lee_kim_2023(0.1).attack
    assert all(getattr(lee_kim.attack, name) == value for name, value in asdict(published).items())
    # steps of 0.007 are those of L-inf
    assert strong_attacks(made, "l2", 0.5) == []
    # other models are attacked as before
    with torch.no_grad():
        alone = Subject(made.classifier, x, made.classifier(x).argmax(1), batch_size=2, n_eval=2, seed=0)
    labels = {spec.label for spec in protocol_attacks("strong", alone, BALL)}
    assert lee_kim.label not in labels


def test_a_defence_names_attacks_of_its_own():
    class Own(torch.nn.Identity):
        def strong_attacks(self, norm, eps):
            return [APGD(), *self.others]

    own = Own()
    own.others = []
    assert [spec.attack for spec in strong_attacks(own, "linf", 0.1)] == [APGD()]
    own.others = ["APGD"]
    with pytest.raises(TypeError, match="APGD"):
        strong_attacks(own, "linf", 0.1)


@pytest.mark.parametrize(("noise", "norm", "expected"), [(0.1, "linf", True), (0.0, "linf", False), (0.1, "l2", False)])
def test_strong_adds_lee_and_kims_attack_for_any_random_purifier(noise, norm, expected):
    """Also for somebody's own."""
    x, y = images(2, SHAPE), torch.zeros(2, dtype=torch.int64)
    own = Purifying(defence(SHAPE).classifier, lambda z: z + noise * torch.randn_like(z)).eval()
    subject = Subject(own, x, y, batch_size=2, n_eval=2, seed=0)
    labels = [spec.label or "" for spec in protocol_attacks("strong", subject, ThreatModel(norm, 0.1))]
    assert any(label.startswith(LEE_KIM) for label in labels) == expected
