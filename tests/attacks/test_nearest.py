"""DeepFool and C&W: the nearest point across the border, known exactly or found by others."""

import pytest
import torch
from evaluating import evaluate

import purify_fast
from purify_fast.attacks import CarliniWagner, DeepFool, carlini_wagner, deepfool
from purify_fast.defences import NoisyEnsemble

pytestmark = pytest.mark.usefixtures("one_thread")

ORDERS = {"linf": torch.inf, "l2": 2.0}
#: By attack and norm: options, and how much further than the border it may end on a linear model of two classes.
EXACT = {
    (deepfool, "linf"): ({"steps": 1}, 1.021),
    (deepfool, "l2"): ({"steps": 1}, 1.021),
    (carlini_wagner, "l2"): ({"steps": 60}, 1.03),
}
cases = pytest.mark.parametrize("attack, norm", EXACT, ids=lambda case: getattr(case, "__name__", case))


class Linear(torch.nn.Module):
    """Two classes of images [B, 1, 4, 4], with a count of the images that it was asked about."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(16, 2, generator=torch.Generator().manual_seed(0)))
        self.asked = 0

    def forward(self, x):
        self.asked += len(x)
        return (x - 0.5).flatten(1) @ self.weight


@pytest.fixture(scope="module")
def plane():
    """The model, images, and by norm how far they are from its border."""
    model, x = Linear(), 0.4 + 0.2 * torch.rand(24, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    logits, normal = model(x).detach(), model.weight.diff(dim=1)[:, 0].detach()
    far = {
        "linf": logits.diff(dim=1)[:, 0].abs() / normal.norm(p=1),
        "l2": logits.diff(dim=1)[:, 0].abs() / normal.norm(),
    }
    kept = far["l2"] > 0.03
    return model, x[kept], logits.argmax(1)[kept], {norm: length[kept] for norm, length in far.items()}


@cases
def test_the_exact_distance_of_a_linear_model(plane, attack, norm):
    model, x, y, far = plane
    options, further = EXACT[attack, norm]
    for factor, falls in ((0.99, False), (further, True)):
        found = attack(model, x, y, eps=factor * far[norm], norm=norm, **options)
        assert ((model(found).argmax(1) != y) == falls).all()
        moved = (found - x).flatten(1).norm(p=ORDERS[norm], dim=1)
        assert (moved <= factor * far[norm] * (1 + 1e-5) + 1e-6).all() and (moved >= 0.98 * far[norm]).all()


@cases
def test_fallen_images_leave_and_queries_are_counted(plane, attack, norm):
    model, x, y, far = plane
    kind = {deepfool: DeepFool, carlini_wagner: CarliniWagner}[attack]
    most, asked = kind(**EXACT[attack, norm][0]).cost(purify_fast.attacks.AttackContext(num_classes=2, norm=norm)), []
    for eps in (0.5 * far[norm], 5 * far[norm].clamp(max=0.15)):
        model.asked = 0
        attack(model, x, y, eps=eps, norm=norm, **EXACT[attack, norm][0])
        asked.append(model.asked / len(x))
    # DeepFool ends at the border in any case
    assert asked[1] <= asked[0] <= most and (attack is deepfool or most / 2 < asked[0] > 2 * asked[1])


def test_a_gradient_that_is_not_finite_is_forgotten(plane):
    model, x, y, far = plane
    calls = []

    def flawed(z):
        logits, _ = model(z), calls.append(z)
        # of the third step a NaN, of the fourth an infinity, of the fifth a number whose square is too large
        flaw = {3: torch.nan, 4: torch.inf, 5: 1e30}.get(len(calls) - 1)
        if flaw is not None and logits.requires_grad:
            logits.register_hook(lambda gradient: torch.full_like(gradient, flaw) * gradient.sign())
        return logits

    found = carlini_wagner(flawed, x, y, eps=1.03 * far["l2"], norm="l2", steps=60)
    assert len(calls) > 6 and (model(found).argmax(1) != y).all()


@cases
def test_beside_foolbox(attack, norm):
    """At half of the images at least, ours is within the size that theirs needs, and a few percent."""
    foolbox = pytest.importorskip("foolbox")
    net, data = purify_fast.zoo.load("digits-standard"), purify_fast.data.load_dataset("digits")
    x, y = data.x_test[:12] / 255, data.y_test[:12]
    x, y = (part[net(x).argmax(1) == y] for part in (x, y))
    theirs, options = {
        (deepfool, "linf"): (foolbox.attacks.LinfDeepFoolAttack(), {}),
        (deepfool, "l2"): (foolbox.attacks.L2DeepFoolAttack(), {}),
        (carlini_wagner, "l2"): (
            foolbox.attacks.L2CarliniWagnerAttack(binary_search_steps=7, steps=40),
            {"constants": 7, "steps": 40},
        ),
    }[attack, norm]
    torch.manual_seed(0)
    apart, _, fell = theirs(foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu"), x, y, epsilons=None)
    far = (apart - x).flatten(1).norm(p=ORDERS[norm], dim=1)
    found = attack(net, x, y, eps=1.03 * far, norm=norm, **options)
    assert fell.all() and (net(found).argmax(1) != y).float().mean() >= 0.5


@pytest.mark.slow
def test_rows_of_a_random_model_and_what_is_refused():
    net, data = purify_fast.zoo.load("digits-standard"), purify_fast.data.load_dataset("digits")
    attacks = [DeepFool(), CarliniWagner(steps=40, norm="l2", eps=2.5)]
    report = evaluate(
        NoisyEnsemble(net, 0.05, 2),
        data.x_test[:16],
        data.y_test[:16],
        eps=0.25,
        attacks=attacks,
        eot_iter=2,
        progress=False,
    )
    assert all(row.accuracy < 0.7 for row in report.rows[1:3])
    assert report.rows[1].own_gradients and report.rows[2].own_gradients
    for kind in (DeepFool, CarliniWagner):
        with pytest.raises(ValueError, match="give_up"):
            kind(give_up=True)
    with pytest.raises(ValueError, match="norm must be l2 for CarliniWagner, got linf"):
        evaluate(net, data.x_test[:4], data.y_test[:4], eps=0.1, attacks=[CarliniWagner()], progress=False)
