"""AToP's training: the specification's numbers, the equivalences, what is trained and what is not."""

import copy
import dataclasses

import pytest
import torch
from small_models import Made, atop, bars_and_classifier, configured, first_digits
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import purify_fast
from purify_fast import cli, data
from purify_fast.attacks import FGSM, fgsm
from purify_fast.methods.atop import AtopConfig, AtopTask, DeepFillGenerator
from purify_fast.methods.atop.task import PatchDiscriminator, SpectralConv, hinge, patch_depth
from purify_fast.training import Batch, FitConfig, fit
from purify_fast.training.config import TrainingAttack


def defence(*parts, **options):
    return atop(*parts, **{"sigma": 0.1, **options})


def batch(n=8, epoch=5, epochs=10):
    x, y = first_digits(n)
    # of the authors' epochs, which have 625 steps of 8 images
    place = {"epoch": epoch, "epochs": epochs, "step": 625 * epoch, "images_before": 5000 * epoch}
    return Batch(data.to_float(x), y, torch.arange(n), 7, **place)


def test_fact_9_hinge():
    assert hinge(torch.tensor([1.5, -0.5]), torch.tensor([-2.0, 0.25])) == pytest.approx(0.6875)
    assert hinge(torch.zeros(4), torch.zeros(4)) == 1
    step = batch(2)
    task = AtopTask(defence(), AtopConfig(gan_grad=True, discriminator_width=1))
    task.discriminator = judge([[-2.0], [0.25]])
    assert task.training_step(step)[1]["deceived"] == 0.875


def test_fact_10_cross_entropy_as_it_enters_the_loss():
    assert AtopConfig().cls_weight == 0.05
    made = defence(classifier=Made(lambda self, x: 0 * x.flatten(1)[:, :10]))
    for weight, share in ((0.05, 0.1151293), (0.1, 0.2302585)):
        config = AtopConfig(attack_method="none", cls_weight=weight, reconstruction_weight=0.0)
        assert AtopTask(made, config).passes(batch()).loss.item() == pytest.approx(share, abs=1e-6)


def judge(opinions):
    """One opinion of each image, over and over, with a parameter and a gradient."""

    def how(self, x):
        return self.opinions.repeat(len(x) // len(self.opinions), 1) + 0 * x.flatten(1).mean(1, keepdim=True)

    return Made(how, opinions=nn.Parameter(torch.tensor(opinions)))


TOTALS = [(2, True, 1.6334923), (1, True, 1.625), (2, False, 0.7584923), (0, False, 0.75)]


@pytest.mark.parametrize(("epoch", "gan", "want"), TOTALS)
def test_fact_11_total(epoch, gan, want):
    # x1 = 0 and x2 = 0.25 everywhere, with a gradient, and logits (2, 0, -1) for every image
    constant = lambda self, image, mask: (0 * image + self.shift, 0 * image + 0.25 + self.shift)  # noqa: E731
    logits = Made(lambda self, x: torch.tensor([2.0, 0.0, -1.0]) + 0 * x.flatten(1).mean(1, keepdim=True))
    made = defence(Made(constant, shift=nn.Parameter(torch.zeros(()))), logits, (1, 8, 8), block=2)
    config = AtopConfig(attack_method="none", gan_grad=gan, discriminator_width=1 if gan else 64)
    task = AtopTask(made, config)
    if gan:
        task.discriminator = judge([[-0.875]])
    x = torch.full((4, 1, 8, 8), 0.75)  # S = 0.5
    step = Batch(x, torch.zeros(4, dtype=torch.int64), torch.arange(4), 0, epoch, 10, 625 * epoch, 5000 * epoch)
    assert task.training_step(step)[0].item() == pytest.approx(want, abs=1e-6)


def test_the_passes_share_noise_and_mask_and_are_as_many_as_needed(monkeypatch):
    made, rows, attacks = defence(), [], []
    run = made.stages
    attack = FGSM.run
    monkeypatch.setattr(FGSM, "run", lambda *a: attacks.append(rows) or attack(*a))
    monkeypatch.setattr(made, "stages", lambda packed: rows.append(packed) or run(packed))
    config = AtopConfig(attack=TrainingAttack(eps=0.1, steps=10), reconstruction_target="clean")
    AtopTask(made, config).passes(batch())
    AtopTask(made, dataclasses.replace(config, reconstruction_target="adversarial")).passes(batch())
    assert len(attacks) == 2
    AtopTask(made, config).passes(batch(epoch=1))  # warm-up: lambda is 0, and no one looks at adversarial images
    assert len(attacks) == 2 and [len(packed) for packed in rows] == [16, 8, 8]
    clean, adversarial = rows[0].chunk(2)
    assert torch.equal(clean[:, 1:], adversarial[:, 1:]) and not torch.equal(clean, adversarial)
    difference = (clean - adversarial)[:, :1]
    assert difference.abs().max() <= 2 * 0.1 + 1e-6  # the noise is the same: only the attack differs
    assert torch.equal(rows[2], clean)


def test_fact_14_no_gan_gradient_equals_no_discriminator(tmp_path):
    """The official code cuts the discriminator's score off from g, so it trains g as without a discriminator."""

    def trained(gan_weight, **options):
        made = defence()
        gan = {"gan_weight": gan_weight, "discriminator_width": 2} if options["gan_grad"] else {}
        config = AtopConfig(attack=TrainingAttack(eps=0.1, steps=10), cls_delay=0, learning_rate=1e-3, **gan, **options)
        fit(AtopTask(made, config), *first_digits(16), FitConfig(2, 8, 3))
        return made.purifier.state_dict()

    cut_off, without = trained(0.0, gan_grad=True), trained(1.0, gan_grad=False)
    with_gan = trained(1.0, gan_grad=True)
    for name in without:
        torch.testing.assert_close(cut_off[name], without[name], atol=1e-6, rtol=1e-5)
    assert any(not torch.allclose(with_gan[name], without[name], atol=1e-5) for name in without)


def test_each_player_trains_alone():
    made = defence()
    options = {"cls_delay": 0, "gan_grad": True, "discriminator_width": 2, "learning_rate": 1e-2}
    task = AtopTask(made, configured(AtopConfig, eps=0.1, **options))
    before = copy.deepcopy(task.model.state_dict())
    updates = task.updates(batch())
    first = next(updates)
    first.loss.backward()
    task.optimizers[first.optimizer].step()
    loss, metrics = (last := next(updates)).loss, last.metrics
    for name, value in task.model.state_dict().items():
        moved = not torch.equal(value, before[name])
        if name.endswith(("weight", "bias")):
            assert moved == name.startswith("discriminator"), name
    middle = copy.deepcopy(task.discriminator.state_dict())
    optimizer = task.optimizers["purifier"]
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    assert all(torch.equal(value, middle[name]) for name, value in task.discriminator.state_dict().items())
    classifier = [name for name in before if name.startswith("defence.classifier.")]
    after = task.model.state_dict()
    assert classifier and all(torch.equal(after[name], before[name]) for name in classifier)
    assert any(not torch.equal(after[name], before[name]) for name in before if "purifier" in name)
    assert metrics.keys() == {"reconstruction", "cross_entropy", "accuracy", "discriminator", "deceived"}


@pytest.mark.parametrize("target", ["adversarial", "clean"])
@pytest.mark.parametrize("transform", ["rt2", "rt3"])
def test_every_pass_has_the_target_and_the_label_of_its_own_image(transform, target):
    """By hand, S = 2 and N = 4: of a purifier that returns its input the error is what the masks hide."""
    same = Made(lambda self, image, mask: self.gain * image, gain=nn.Parameter(torch.ones(())))
    # logits of an image: three times the means of its four rows of blocks
    rows = Made(lambda self, x: 3 * x.unflatten(2, (4, -1)).mean((1, 3, 4)))
    made = defence(same, rows, transform=transform, sigma=0.0, samples=2)
    brightness = torch.tensor([0.2, 0.6, 1.0]).view(3, 1, 1, 1)
    x = brightness * torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    y, eps = torch.tensor([2, 0, 3]), 0.1
    step = Batch(x, y, torch.arange(3), 7, 5, 10, 3125, 25000)
    config = AtopConfig(attack=TrainingAttack(eps=eps, steps=10), reconstruction_target=target)
    metrics = AtopTask(made, config).passes(step).metrics
    adversarial = fgsm(rows, x, y, eps=eps)
    rebuilt = 2 * (x if target == "clean" else adversarial) - 1
    owners = made.draw(x, noise=(torch.tensor([7]), torch.arange(3)))[1]  # [S, B, 4, 4]
    l1, losses = [], []
    for blocks in owners:
        hidden = blocks.repeat_interleave(4, 1).repeat_interleave(4, 2)
        for image, attacked, label, where in zip(rebuilt, adversarial, y, hidden, strict=True):
            l1 += [(image[0].abs() * (where == part)).mean() for part in (range(4) if transform == "rt3" else [1])]
            grey = torch.full_like(attacked[0], 0.5)
            purified = grey if transform == "rt3" else torch.where(where == 1, grey, attacked[0])
            logits = 3 * purified.view(4, 4, 16).mean((1, 2))
            losses.append(logits.exp().sum().log() - logits[label])
    assert len(l1) == (24 if transform == "rt3" else 6) and len(losses) == 6
    assert metrics["reconstruction"].item() == pytest.approx(float(torch.stack(l1).mean()), rel=1e-5)
    assert metrics["cross_entropy"].item() == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)


def test_the_pipeline_is_what_is_attacked():
    """PGD through the pipeline raises the pipeline's loss more than PGD on the classifier does."""
    made, step = defence(sigma=0.02, mask_ratio=0.1), batch(32)
    losses = {}
    for target in ("classifier", "pipeline"):
        config = configured(AtopConfig, attack_method="pgd", attack_target=target, eps=0.2, cls_delay=0)
        losses[target] = float(AtopTask(made, config).passes(step).metrics["cross_entropy"])
    assert losses["pipeline"] > losses["classifier"]


# -- deepFillv2's own training: SN-PatchGAN and its spectral normalization ---------------------------------------------


@pytest.fixture(scope="module")
def published():
    torch.manual_seed(0)
    return PatchDiscriminator()


def test_fact_6_sizes(published):
    assert sum(p.numel() for p in published.parameters()) == 5_946_816
    assert sum(b.numel() for b in published.buffers()) == 1216
    with torch.no_grad():
        logits = published(torch.rand(1, 4, 256, 256))
        assert logits.shape == (1, 4096) and logits.isfinite().all() and logits.std() > 0
        assert published(torch.rand(2, 4, 64, 64)).shape == (2, 256)


def test_tensors_have_the_official_names(published):
    names = {f"conv{i}.conv_sn.{leaf}" for i in range(1, 7) for leaf in ("weight", "bias", "weight_u")}
    state = published.state_dict()
    assert state.keys() == names
    assert state["conv3.conv_sn.weight"].shape == (256, 128, 5, 5) and state["conv3.conv_sn.weight_u"].shape == (256, 1)


def test_leaky_relu_follows_every_layer_the_last_too():
    made = PatchDiscriminator(2, 4, depth=1).eval()
    x = torch.randn(1, 2, 6, 6)
    out = made.conv1.conv_sn(x).flatten(1)
    assert (out < 0).any() and torch.equal(made(x), torch.where(out > 0, out, 0.2 * out))


PATCHES = [((256, 256), 6, 16), ((32, 32), 4, 4), ((28, 28), 4, 4), ((16, 16), 3, 4), ((16, 40), 3, 10), ((3, 3), 1, 4)]


@pytest.mark.parametrize(("size", "depth", "patches"), PATCHES)
def test_small_images_have_at_least_2_x_2_patches(size, depth, patches):
    assert patch_depth(size) == depth
    made = PatchDiscriminator(3, 2, depth)
    assert made(torch.rand(2, 3, *size)).shape == (2, patches * 2 * (1, 2, 4, 4, 4, 4)[depth - 1])


@pytest.mark.parametrize("training", [True, False])
def test_values_and_gradients_equal_torchs(training):
    ours = SpectralConv(3, 8, 5, 2, 2)
    plain = torch.nn.Conv2d(3, 8, 5, 2, 2)
    with torch.no_grad():
        plain.weight.copy_(ours.weight)
        plain.bias.copy_(ours.bias)
    theirs = spectral_norm(plain)
    state = theirs.parametrizations.weight[0]
    v = torch.nn.functional.normalize(ours.weight.detach().flatten(1).T @ ours.weight_u, dim=0)[:, 0]
    state._u.copy_(ours.weight_u[:, 0])
    state._v.copy_(v)
    ours.train(training)
    theirs.train(training)
    x = torch.randn(2, 3, 8, 8)
    for layer in (ours, theirs):
        layer(x).square().sum().backward()
    torch.testing.assert_close(ours.weight.grad, theirs.parametrizations.weight.original.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.bias.grad, theirs.bias.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.weight_u[:, 0], state._u)


def test_autocast_keeps_sigma_exact():
    layer = SpectralConv(3, 8, 5, 2, 2)
    twin = copy.deepcopy(layer)
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        want = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            got = twin(x)
    assert got.dtype == torch.bfloat16 and torch.equal(layer.weight_u, twin.weight_u)
    assert (got - want).abs().max() < 0.02 * want.abs().max()


# -- AToP on the command line: made, trained, started from another, resumed, evaluated; and what is refused, how -------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Data of a user's own, two classes, grey, 16 x 8, and a classifier for them."""
    return bars_and_classifier(tmp_path_factory.mktemp("atop"))


def run(what, made, out, *options):
    """``train generator`` or ``train atop`` for an epoch of four steps; the exit status."""
    common = ["--data", str(made / "bars.npz"), "--classifier", str(made / "classifier"), "--device", "cpu"]
    if what == "atop" and "--cls-delay" not in options:
        # four steps are shorter than the usual delay
        options = (*options, "--cls-delay", "0")
    return cli.main(["train", what, "--out", str(out), *common, "--epochs", "1", "--batch-size", "16", *options])


def test_a_published_checkpoint_is_what_training_starts_from(made, tmp_path, capsys):
    torch.manual_seed(0)
    path = tmp_path / "states.pth"
    torch.save({"G": DeepFillGenerator(3, 4).state_dict()}, path)
    options = ["--init", "None", "--purifier", "deepfill", "--weights", str(path), "--learning-rate", "0"]
    transform = ["--transform", "rt2", "--sigma", "0.2", "--block", "4", "--mask-ratio", "0.5", "--samples", "2"]
    transform += ["--aggregation", "mean_softmax", "--shared-mask"]
    assert run("atop", made, tmp_path / "out", *options, "--cls-delay=0", *transform) == 0
    loaded, wanted = purify_fast.load_defence(tmp_path / "out"), DeepFillGenerator.from_official(path).state_dict()
    assert loaded.purifier.module.arguments["width"] == 4 and loaded.shared_mask and loaded.samples == 2
    assert (loaded.sigma, loaded.block, loaded.mask_ratio, loaded.aggregation) == (0.2, 4, 0.5, "mean_softmax")
    assert loaded.arguments["transform"] == "rt2"
    assert all(torch.equal(value, wanted[name]) for name, value in loaded.purifier.module.state_dict().items())
    assert run("atop", made, tmp_path / "other", *options, "--width", "4") == 2
    assert "--width has no effect beside --weights" in capsys.readouterr().err
    assert run("atop", made, tmp_path / "other", *options, "--weights", str(tmp_path / "none.pth")) == 2
    assert "none.pth" in capsys.readouterr().err
