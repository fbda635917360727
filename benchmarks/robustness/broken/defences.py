"""The rebuilt defences. Each keeps the mechanism that made attacks fail on the original, at the size of digits.

A function builds what is deployed and what its adaptive attack follows in its place: the same forward pass with the
gradient that the mechanism hides, the same model averaged over noise, or the output before it saturates. The `chain` of
an entry says which of them are followed, for how long and by how many draws. An entry without a chain is attacked along
its own gradients, averaged over draws if it is random.

``published`` is the accuracy that the cited attack left of the published defence, with its place in the paper of the
attack. In table 1 of Athalye et al. the row of Guo et al. is for all of their transformations. Carlini and Wagner say
in their abstract that the attacks succeed with a probability of 100 %.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg

from purify_fast import zoo

from . import entry as parts
from .adaptive import MANY_DRAWS, away, drawn, every_class, long
from .entry import Build, Function, Step, behind, cross_entropy, entry, layers, network, straight_through, train

Models = tuple[nn.Module, ...]
ATHALYE, TRAMER, CROCE = "Athalye et al. 2018", "Tramer et al. 2020", "Croce et al. 2022"
BPDA, EOT = f"BPDA, {ATHALYE}", f"EOT, {ATHALYE}"
#: The data set, norm and radius of published figures, with their table in the paper of the attack.
ON_IMAGENET, ON_CIFAR10 = "(ImageNet, L2 0.005; table 1)", "(CIFAR-10, 0.031; table 1)"
#: The settings of a random model. Fewer images are attacked, since each step takes several draws.
RANDOM: dict[str, Any] = {"random": True, "images": 40}
GUO, XIE = "Guo et al., ICLR 2018", "Xie et al., ICLR 2018"


# -- functions of the image -------------------------------------------------------------------------------------------


def fewer_bits(x: Tensor, levels: int = 8) -> Tensor:
    """Each pixel rounded to one of so many values."""
    return (x * (levels - 1)).round() / (levels - 1)


def jpeg(x: Tensor) -> Tensor:
    """Each image compressed by JPEG of quality 50, and read again."""
    images = (x.detach().clamp(0, 1) * 255).round().to(torch.uint8)
    return torch.stack([decode_jpeg(encode_jpeg(image, 50), ImageReadMode.RGB) for image in images]).to(x) / 255


def total_variation(x: Tensor) -> Tensor:
    """Half of the pixels dropped, and an image of small total variation fitted to the others by 15 gradient steps."""
    given = (torch.rand_like(x) < 0.5).to(x)
    image = F.avg_pool2d(x * given, 3, 1, 1) / F.avg_pool2d(given, 3, 1, 1).clamp_min(0.1)
    for _ in range(15):
        across, down = (slope / (slope**2 + 1e-2).sqrt() for slope in (image.diff(dim=3), image.diff(dim=2)))
        rises = F.pad(across, (1, 0)) - F.pad(across, (0, 1)) + F.pad(down, (0, 0, 1, 0)) - F.pad(down, (0, 0, 0, 1))
        image = image - 0.5 * (given * (image - x) + 0.03 * rises)
    return image.clamp(0, 1)


def low_rank(x: Tensor) -> Tensor:
    """Half of the pixels dropped, and the matrix of the others estimated by its five largest singular values."""
    u, s, v = torch.linalg.svd((2 * x - 1) * (torch.rand_like(x) < 0.5))
    return ((u[..., :5] * s[..., None, :5]) @ v[..., :5, :] + 0.5).clamp(0, 1)


def median(x: Tensor) -> Tensor:
    """The median of each pixel and its eight neighbors."""
    windows = F.pad(x, [1] * 4, mode="reflect").unfold(2, 3, 1).unfold(3, 3, 1)
    return windows.flatten(-2).median(-1).values


def resized(x: Tensor) -> Tensor:
    """A random size and a random place on a canvas of 36 pixels, drawn once for all images of a call."""
    size = int(torch.randint(x.shape[-1], 36, ()))
    left, top = (int(torch.randint(0, 37 - size, ())) for _ in range(2))
    return F.pad(F.interpolate(x, size=(size, size)), [left, 36 - size - left, top, 36 - size - top])


def barrage(x: Tensor, reduce: Function = fewer_bits) -> Tensor:
    """Another contrast, a blur, fewer gray levels, noise and dropped pixels, each for a random half of the images."""
    for change in (
        lambda x: (x - 0.5) * (0.7 + 0.6 * torch.rand(len(x), 1, 1, 1)) + 0.5,
        lambda x: F.avg_pool2d(x, 3, 1, 1),
        reduce,
        lambda x: x + 0.1 * torch.randn_like(x),
        lambda x: x * (torch.rand_like(x) > 0.1),
    ):
        x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, change(x), x)
    return x.clamp(0, 1)


def staircase(x: Tensor, levels: int = 8) -> Tensor:
    """`fewer_bits` with soft steps, whose slope is largest between two values."""
    steps = (levels - 1) * x
    return (steps - torch.sin(2 * torch.pi * steps) / (2 * torch.pi)) / (levels - 1)


def mean_filter(x: Tensor) -> Tensor:
    """The mean of each pixel and its neighbors, which has a gradient to all of them."""
    return F.avg_pool2d(F.pad(x, [1] * 4, mode="reflect"), 3, 1)


def purifier(purify: Function, base: str, *smooth: Function) -> Build:
    """A classifier of the zoo behind a purifier without a gradient; BPDA takes the identity's, and those of others."""
    blind, seeing = parts.without_gradient(purify), [straight_through(purify, one) for one in (lambda x: x, *smooth)]
    return lambda x, y: (behind(blind, zoo.load(base)), *(behind(one, zoo.load(base)) for one in seeing))


ON_CIFAR: dict[str, Any] = {"data": "cifar10", "eps": 8 / 255, "images": 50}
entry("bit-depth reduction", GUO, BPDA, chain=long(1, 2), published=f"0 {ON_IMAGENET}")(
    purifier(fewer_bits, "digits-standard", staircase)
)
# The steps of the minimization are differentiable, so the adaptive attack also follows their exact gradient.
entry("total variation minimization", GUO, BPDA, chain=drawn(1, 2), published=f"0 {ON_IMAGENET}", **RANDOM)(
    purifier(total_variation, "digits-standard", total_variation)
)
entry(
    "JPEG compression",
    GUO,
    BPDA,
    published=f"0 {ON_IMAGENET}",
    **ON_CIFAR,
    chain=(away(steps=100, restarts=2), every_class(steps=100, restarts=1)),
)(purifier(jpeg, "cifar10-pgd-at-w16"))
entry("feature squeezing by medians", "Xu et al., NDSS 2018", "through the filter, He et al. 2017", chain=long(0, 1))(
    lambda x, y: (
        behind(median, zoo.load("digits-standard")),
        behind(straight_through(median, mean_filter), zoo.load("digits-standard")),
    )
)
entry(
    "random resizing and padding",
    XIE,
    EOT,
    published="0 (ImageNet, 0.031; table 1)",
    **ON_CIFAR | RANDOM,
    chain=drawn(0, draws=10, steps=50, classes=3),
)(lambda x, y: behind(resized, zoo.load("cifar10-pgd-at-w16")))


@entry("thermometer encoding", "Buckman et al., ICLR 2018", BPDA, chain=long(1, 2), published=f"0 {ON_CIFAR10}")
def thermometer(x: Tensor, y: Tensor) -> Models:
    levels = torch.arange(10).view(-1, 1, 1) / 10

    def above(x: Tensor) -> Tensor:
        return (x[:, :, None] - levels).flatten(1, 2).clamp(0, 1)

    def codes(x: Tensor) -> Tensor:
        return (above(x) > 0).to(x)

    def soft(x: Tensor) -> Tensor:
        return torch.sigmoid(20 * (x[:, :, None] - levels)).flatten(1, 2)

    classifier = train(network(in_channels=10), codes(x), y)
    seeing = (behind(straight_through(codes, smooth), classifier) for smooth in (above, soft))
    return behind(parts.without_gradient(codes), classifier), *seeing


@entry("ME-Net", "Yang et al., ICML 2019", f"BPDA and EOT, {TRAMER}", chain=drawn(1, draws=MANY_DRAWS), **RANDOM)
def matrix_estimation(x: Tensor, y: Tensor) -> Models:
    model = train(behind(parts.without_gradient(low_rank), network()), x, y, epochs=40)
    return model, behind(straight_through(low_rank), model[1])


@entry(
    "barrage of random transforms",
    "Raff et al., CVPR 2019",
    "BPDA and EOT, Sitawarin et al. 2022",
    chain=drawn(1, draws=MANY_DRAWS),
    **RANDOM,
)
def random_transforms(x: Tensor, y: Tensor) -> Models:
    model = train(behind(barrage, network()), x, y, epochs=40)
    return model, behind(partial(barrage, reduce=straight_through(fewer_bits)), model[1])


def denoiser(x: Tensor, y: Tensor) -> nn.Module:
    """An autoencoder that was trained to take noise of any strength up to 0.3 away."""
    grow, norm = nn.Upsample(scale_factor=2), nn.Sigmoid()
    shrink = nn.Conv2d(1, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, 2, 1), nn.ReLU()
    coder = nn.Sequential(*shrink, grow, nn.Conv2d(32, 32, 3, 1, 1), nn.ReLU(), grow, nn.Conv2d(32, 1, 3, 1, 1), norm)

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(model(x + 0.3 * torch.rand(len(x), 1, 1, 1) * torch.randn_like(x)), x)

    return train(coder, x, y, loss, epochs=40)


@entry("PixelDefend, by an autoencoder", "Song et al., ICLR 2018", BPDA, chain=long(1, 2), published=f"9 {ON_CIFAR10}")
def pixel_defend(x: Tensor, y: Tensor) -> Models:
    clean, classifier = denoiser(x, y), zoo.load("digits-standard")
    levels = Step(partial(fewer_bits, levels=32))
    purify = nn.Sequential(levels, clean, levels)
    seeing = (behind(straight_through(purify, smooth), classifier) for smooth in (clean, lambda x: x))
    return nn.Sequential(purify, classifier), *seeing


@entry(
    "diffusion under no_grad",
    "Nie et al., ICML 2022",
    "full gradients and EOT, Lee and Kim 2023",
    chain=drawn(1, 2),
    **RANDOM,
)
def diffusion(x: Tensor, y: Tensor) -> Models:
    clean, classifier = denoiser(x, y), zoo.load("digits-standard")

    def purify(x: Tensor) -> Tensor:
        # noise is added and taken away again, less each time
        for sigma in (0.3, 0.2, 0.1):
            x = clean(x + sigma * torch.randn_like(x))
        return x

    seeing = (behind(function, classifier) for function in (purify, straight_through(purify)))
    return behind(parts.without_gradient(purify), classifier), *seeing


@entry("anti-adversary layer", "Alfarra et al., AAAI 2022", f"the classifier alone, {CROCE}", chain=long(1, 0))
def anti_adversary(x: Tensor, y: Tensor) -> Models:
    classifier = zoo.load("digits-standard")

    def away(x: Tensor) -> Tensor:
        point = x
        with torch.enable_grad():
            label = classifier(x).argmax(1)
            for _ in range(2):
                # towards the predicted class: a negative length
                point = parts.signed_step(classifier, point, label, -0.1)
        return x + (point - x).detach()

    return behind(away, classifier), classifier


# -- changes inside the network ---------------------------------------------------------------------------------------


def winners(activation: Tensor) -> Tensor:
    """Of each image's activations only the largest tenth stays."""
    flat = activation.flatten(1)
    least = flat.topk(round(0.1 * flat.shape[1]), dim=1).values[:, -1:]
    return (flat * (flat >= least)).view_as(activation)


def prune(activation: Tensor) -> Tensor:
    """Activations drawn by their size, as often as there are any, and scaled by how likely they are drawn."""
    flat = activation.flatten(1)
    share = flat.abs() / flat.abs().sum(1, keepdim=True).clamp_min(1e-12)
    survives = (1 - (1 - share) ** flat.shape[1]).detach()
    return (flat * (torch.rand_like(flat) < survives) / survives.clamp_min(1e-6)).view_as(activation)


def quantized(activation: Tensor, levels: int) -> Tensor:
    """Each activation rounded to one of so many values of its range."""
    scale = activation.detach().abs().amax().clamp_min(1e-12) / (levels - 1)
    return (activation / scale).round() * scale


class MeanSparse(nn.Module):
    """Features near to their channel's mean become the mean; the first call measures mean and deviation.

    Args:
        threshold: in deviations.

    Its ``gate``, if there is one, is the share of a feature's distance from the mean whose gradient stands for that of
    the step, a function of this distance in thresholds.
    """

    def __init__(self, threshold: float):
        super().__init__()
        self.threshold = threshold
        self.gate: Function | None = None
        self.statistics: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.statistics is None:
            axes = [0, *range(2, x.dim())]
            self.statistics = x.mean(axes, keepdim=True), x.std(axes, keepdim=True)
            return x
        mean, deviation = self.statistics
        away = (x - mean).abs() / deviation.clamp_min(1e-12)
        sparse = torch.where(away <= self.threshold, mean, x)
        if self.gate is None:
            return sparse
        easy = mean + (x - mean) * self.gate(away / self.threshold)
        return easy + (sparse - easy).detach()


@entry(
    "MeanSparse, threshold 0.4",
    "Amini et al. 2024",
    f"straight-through, after {ATHALYE}",
    eps=0.2,
    chain=(*long(1, 2, 3, 4, steps=100), away(0), every_class(2, restarts=4)),
)
def sparse_around_means(x: Tensor, y: Tensor) -> Models:
    base = zoo.load("digits-pgd-at")
    model = layers(base, lambda: nn.Sequential(MeanSparse(0.4), nn.SiLU()))
    with torch.no_grad():
        model(x)

    def with_gates(gate: Function, threshold: float = 0.4) -> nn.Module:
        changed = copy.deepcopy(model)
        for module in changed.modules():
            if isinstance(module, MeanSparse):
                module.gate, module.threshold = gate, threshold
        return changed

    soft, passing = (lambda share: torch.sigmoid(6 * (share - 1))), torch.ones_like
    # a smaller threshold lies between the network without sparse features and the deployed one
    return model, with_gates(passing), with_gates(soft), with_gates(passing, 0.2), base


@entry(
    "stochastic activation pruning",
    "Dhillon et al., ICLR 2018",
    EOT,
    chain=drawn(0, 1),
    published=f"0 {ON_CIFAR10}",
    **RANDOM,
)
def stochastic_pruning(x: Tensor, y: Tensor) -> Models:
    base = zoo.load("digits-standard")
    return layers(base, lambda: nn.Sequential(nn.SiLU(), Step(prune))), base


class NoisyWeights(nn.Module):
    """A layer whose weights get Gaussian noise of a share of their deviation in each call, in training and after it.

    Args:
        layer: a convolution or a linear layer.
        share: of the deviation of its weights; the published one is trained.
    """

    def __init__(self, layer: nn.Conv2d | nn.Linear, share: float = 0.5):
        super().__init__()
        self.layer, self.share = layer, share

    def forward(self, x: Tensor) -> Tensor:
        weight = self.layer.weight
        noisy = weight + self.share * weight.detach().std() * torch.randn_like(weight)
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, noisy, self.layer.bias)
        return F.conv2d(x, noisy, self.layer.bias, self.layer.stride, self.layer.padding)


@entry(
    "noisy gradients by noise in the weights",
    "He et al., CVPR 2019",
    f"EOT, after {ATHALYE}",
    chain=drawn(0, 1, draws=MANY_DRAWS),
    **RANDOM,
)
def noisy_weights(x: Tensor, y: Tensor) -> Models:
    net = network()
    convolutions = [NoisyWeights(one) for one in (net.conv1, net.conv2, net.conv3, net.conv4)]
    active = [part for one in convolutions for part in (one, net.act)]
    dense = [nn.Flatten(), NoisyWeights(net.hidden), net.act, NoisyWeights(net.head)]
    model = nn.Sequential(Step(lambda x: 2 * x - 1), *active, *dense)

    def one_step(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(model, x, y) + cross_entropy(model, parts.signed_step(model, x, y, 0.05), y)

    return train(model, x, y, one_step, epochs=30), net.eval()


@entry(
    "k-winners-take-all",
    "Xiao et al., ICLR 2020",
    f"gradients averaged over noise, {TRAMER}",
    chain=(every_class(2), every_class(1, steps=50, restarts=1), away(1, steps=50, restarts=1), away(0)),
)
def k_winners(x: Tensor, y: Tensor) -> Models:
    net = network()
    model = train(layers(net, lambda: Step(winners)), x, y, epochs=30)
    through = layers(net, lambda: Step(straight_through(winners)))

    def smooth(x: Tensor) -> Tensor:
        copies = x.repeat(32, 1, 1, 1)
        return model(copies + 0.05 * torch.randn_like(copies)).unflatten(0, (32, -1)).mean(0)

    return model, Step(smooth), through


# -- changes of training and output -----------------------------------------------------------------------------------


class Averaged(nn.Module):
    """Probabilities of several classifiers averaged.

    Args:
        members: images to logits; one that is random may stand there several times.
        votes: whether the classes that they name are counted, and probabilities decide between equal counts only.
    """

    def __init__(self, members: Sequence[nn.Module], votes: bool = False):
        super().__init__()
        self.members, self.votes = nn.ModuleList(members), votes

    def forward(self, x: Tensor) -> Tensor:
        each = torch.stack([member(x).log_softmax(1) for member in self.members])
        if not self.votes:
            return each.logsumexp(0)
        return F.one_hot(each.argmax(2), each.shape[2]).sum(0) + 0.5 * each.exp().mean(0)


@entry("random self-ensemble", "Liu et al., ECCV 2018", EOT, chain=drawn(0, draws=10), **RANDOM)
def self_ensemble(x: Tensor, y: Tensor) -> nn.Module:
    noise = Step(lambda x: x + 0.3 * torch.randn_like(x))
    return Averaged([train(layers(network(), lambda: nn.Sequential(nn.SiLU(), noise)), x, y, epochs=30)] * 5).eval()


@entry("ensemble diversity", "Pang et al., ICML 2019", f"longer searches, {TRAMER}", chain=long(0, steps=500))
def diversity(x: Tensor, y: Tensor) -> nn.Module:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        members = torch.stack([member(x).log_softmax(1) for member in model.members], 1)
        own, mean = y[:, None, None].expand(-1, 3, 1), members.exp().mean(1)
        entropy = -(mean * mean.clamp_min(1e-9).log()).sum(1).mean()
        others = F.normalize(members.exp().scatter(2, own, 0), dim=2)
        volume = torch.linalg.det(others @ others.transpose(1, 2) + 1e-4 * torch.eye(3)).clamp_min(1e-9)
        return -members.gather(2, own).sum(1).mean() - 2 * entropy - 0.5 * volume.log().mean()

    return train(Averaged([network() for _ in range(3)]), x, y, loss, epochs=30)


@entry(
    "EMPIR",
    "Sen et al., ICLR 2020",
    f"BPDA on the averaged ensemble, {TRAMER}",
    chain=long(1, 2),
    published="1.5 (CIFAR-10, 0.031; section 12)",
)
def mixed_precision(x: Tensor, y: Tensor) -> Models:
    full, *others = (train(network(), x, y) for _ in range(3))

    def ensemble(around: Callable[[Function], Function], votes: bool) -> nn.Module:
        members = [full]
        for net, levels in zip(others, (4, 8), strict=True):
            rounding = Step(around(partial(quantized, levels=levels)))
            members.append(layers(net, lambda rounding=rounding: nn.Sequential(nn.SiLU(), rounding)))
        return Averaged(members, votes).eval()

    smooth = Averaged([full, *others]).eval()
    return ensemble(lambda hard: hard, True), ensemble(straight_through, False), smooth


@entry(
    "the odds are odd",
    "Roth et al., ICML 2019",
    f"logits of clean images matched under EOT, {TRAMER}",
    # Each draw of the matched logits takes 17 copies of an image, so the steps average only a few draws.
    chain=(
        away(1, steps=50, restarts=2, loss="margin", eot_iter=2),
        every_class(1, steps=50, restarts=1, eot_iter=2),
        away(0, steps=100, eot_iter=4),
    ),
)
def odds(x: Tensor, y: Tensor) -> Models:
    classifier = zoo.load("digits-standard")

    def under_noise(x: Tensor, draws: int) -> Tensor:
        copies = x.repeat(draws, 1, 1, 1)
        return classifier(copies + 0.1 * torch.randn_like(copies)).unflatten(0, (draws, -1)).mean(0)

    def change(x: Tensor, logits: Tensor) -> Tensor:
        """How noise moves each logit against the predicted one, on average."""
        moved = under_noise(x, 16) - logits
        return moved - moved.gather(1, logits.argmax(1, keepdim=True))

    with torch.no_grad():
        clean = classifier(x)
        by_class = [change(x, clean)[clean.argmax(1) == label] for label in range(10)]
        mean, deviation = torch.stack([a.mean(0) for a in by_class]), torch.stack([a.std(0) for a in by_class])
        typical = torch.stack([clean[y == label].mean(0) for label in range(10)])

    def corrected(x: Tensor) -> Tensor:
        logits, rows = classifier(x), torch.arange(len(x))
        top = logits.argmax(1)
        with torch.no_grad():
            odd = (change(x, logits) - mean[top]) / deviation[top].clamp_min(1e-3)
            odd[rows, top] = -torch.inf
            score, other = odd.max(1)
        # where the change is odd, the class that gains most takes the place of the predicted one
        place = torch.arange(10).repeat(len(x), 1)
        place[rows, top], place[rows, other] = other, top
        return torch.where((score > 3)[:, None], logits.gather(1, place), logits)

    def near_typical(x: Tensor) -> Tensor:
        return -torch.cdist(torch.stack([classifier(x), under_noise(x, 16)]), typical).mean(0)

    return Step(corrected, classifier), Step(near_typical, classifier)


@entry("mixup inference", "Pang et al., ICLR 2020", f"EOT, {TRAMER}", chain=drawn(0, 1, draws=10), **RANDOM)
def mixup_inference(x: Tensor, y: Tensor) -> Models:
    def mixup(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        share, other = torch.rand(()), torch.randperm(len(x))
        logits = model(share * x + (1 - share) * x[other])
        return share * F.cross_entropy(logits, y) + (1 - share) * F.cross_entropy(logits, y[other])

    classifier = train(network(), x, y, mixup, epochs=40)

    def mixed(images: Tensor) -> Tensor:
        same = y == classifier(images).argmax(1, keepdim=True)
        # eight images of other classes for each image
        others = torch.rand(same.shape).masked_fill(same, -1).topk(8).indices
        points = 0.6 * images[:, None] + 0.4 * x[others]
        return classifier(points.flatten(0, 1)).unflatten(0, (-1, 8)).log_softmax(2).logsumexp(1)

    return Step(mixed, classifier), classifier


@entry(
    "error-correcting codes",
    "Verma and Swami, NeurIPS 2019",
    f"the bits before they saturate, {TRAMER}",
    chain=long(1, 0),
)
def error_correction(x: Tensor, y: Tensor) -> Models:
    words, net = torch.randint(0, 2, (10, 32)).float() * 2 - 1, network(num_classes=32)
    train(net, x, y, lambda model, x, y: F.relu(1 - model(x) * words[y] / 4).mean())

    def probabilities(bits: Tensor) -> Tensor:
        similar = (torch.tanh(bits) @ words.T).clamp_min(0) + 1e-12
        return (similar / similar.sum(1, keepdim=True)).log()

    return nn.Sequential(net, Step(probabilities)), nn.Sequential(net, Step(lambda bits: bits @ words.T / 32))


@entry(
    "defensive distillation",
    "Papernot et al., S&P 2016",
    "logits divided, Carlini and Wagner 2017",
    data="mnist",
    images=50,
    chain=long(1),
    published="0 (MNIST, any distance; abstract)",
)
def distillation(x: Tensor, y: Tensor) -> Models:
    def hot(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x) / 40, y)

    teacher, student = network(image_size=(28, 28)), network(image_size=(28, 28))
    train(teacher, x, y, hot, epochs=8)
    train(student, x, y, lambda model, x, y: hot(model, x, (teacher(x) / 40).softmax(1)), epochs=12)
    return student, nn.Sequential(student, Step(lambda logits: logits / 40))


@entry(
    "cascade adversarial training",
    "Na et al., ICLR 2018",
    f"PGD, {ATHALYE}",
    eps=0.2,
    chain=long(0, steps=400),
    published="15 (CIFAR-10, 0.015; table 1)",
)
def cascade(x: Tensor, y: Tensor) -> nn.Module:
    def one_step(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(model, x, y) + cross_entropy(model, parts.signed_step(model, x, y, 0.2), y)

    first, transferred = train(network(), x, y, one_step, epochs=30), x
    for _ in range(4):
        transferred = parts.signed_step(first, transferred, y, 0.05)
    # the second network also learns images that were found on the first one by several steps
    return train(network(), torch.cat([x, transferred]), y.repeat(2), one_step, epochs=30)
