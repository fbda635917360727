"""The study on CIFAR-10: amounts of training and judging, its rows by name, and their relations."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from .. import settings_of
from .candidates import CANDIDATES, ELIGIBLE, MIXED


@dataclass(frozen=True)
class Training:
    """The amounts of each training. The defaults are for a CPU: attacks take half as many steps as with --full."""

    width: int = 16
    #: Width of the larger base, which has at least as many parameters as base and purifier together.
    large_width: int = 28
    #: Epochs of the larger base, which takes as much training compute as base and purifier together.
    large_epochs: int = 8
    #: Epochs of the longer base, which takes as much training compute as base and purifier together.
    long_epochs: int = 24
    standard_epochs: int = 15
    base_epochs: int = 15
    arrest_epochs: int = 6
    search_epochs: int = 1
    objective_epochs: int = 5
    pipeline_epochs: int = 2
    generator_epochs: int = 2
    #: In AToP with the paper's objective the cross-entropy takes part only after this many images, as many as in the
    #: authors' two epochs.
    atop_delay_images: int = 10_000
    #: How many of the first images are used for training. The images after them decide which candidate is best.
    train_images: int = 49000
    steps: int = 5
    carso_steps: int = 20
    batch_size: int = 128
    ema_decay: float = 0.995
    awp_gamma: float = 0.005
    weights: tuple[float, ...] = (5.0, 50.0)
    angles: tuple[float, ...] = (10.0, 30.0)
    samples: int = 4


@dataclass(frozen=True)
class Judging:
    """The number of images that each protocol attacks; 0 leaves it out. The defaults are for a CPU.

    Attributes:
        clean: test images of clean accuracy. fast: test images. standard: test images. strong: test images, and
            held-out training images of the candidates. official: test images of the rows that the official AutoAttack
            attacks too. held_out: training images of the candidates' clean accuracy.
        authors: test images of `AS_AUTHORS`, whose predictions are random, so that every step averages gradients.
        tried: the protocol that judges candidates.
    """

    clean: int = 10000
    fast: int = 1000
    standard: int = 200
    strong: int = 50
    official: int = 200
    held_out: int = 1000
    authors: int = 200
    tried: Literal["fast", "strong"] = "strong"

    def protocols(self) -> dict[str, int]:
        """The protocols that attack every model, each with its number of images."""
        counts = {"fast": self.fast, "standard": self.standard, "strong": self.strong}
        return {name: count for name, count in counts.items() if count > 0}

    def beside_official(self) -> list[str]:
        """The protocols that attack all images that the official AutoAttack attacks."""
        return [name for name, count in self.protocols().items() if count >= self.official]

    @property
    def candidates(self) -> int:
        """The number of held-out training images on which candidates are attacked."""
        return {"fast": self.fast, "strong": self.strong}[self.tried]

    @property
    def main(self) -> str:
        """The protocol that compares models: the strongest of the protocols with most images."""
        counts = self.protocols()
        return max(counts, key=lambda name: (counts[name], list(counts).index(name)))


@dataclass(frozen=True)
class Budget:
    """The amounts of everything.

    Attributes:
        training: amounts for each model. judging: amounts for each model.
        shares: bases trained at shares of eps; with the standard classifier and the base they form the curve of
            comparison.
        seeds: number of trainings of compared models, each with its own seed.
    """

    training: Training = Training()
    judging: Judging = Judging()
    shares: tuple[float, ...] = (0.5,)
    seeds: int = 2

    def of_width(self, width: int) -> Budget:
        """The same budget with networks of another width; the larger base is wider in the same proportion.

        At another width the larger and the longer base no longer match the parameters, or the training compute, of base
        and purifier together: a purifier does not grow with its classifier's width.

        Args:
            width: channels of the first stage.
        """
        amount = self.training
        large = -(-amount.large_width * width // amount.width)
        return replace(self, training=replace(amount, width=width, large_width=large))


def budget_of(amount: str) -> Budget:
    """The budget by its name in settings.yaml."""
    other = dict(settings_of("cifar10")[amount])
    training, judging = Training(**other.pop("training", {})), Judging(**other.pop("judging", {}))
    return Budget(training, judging, **other)


EPS = 8 / 255
#: The layers that CARSO reads in the classifier: the blocks that end its last three stages.
LAYERS = ("stages.1.1", "stages.2.1", "stages.3.1")
STANDARD, BASE, LARGE, AWP, TRADES = "standard", "PGD-AT", "PGD-AT, larger", "PGD-AT, AWP", "TRADES"
NO_EMA, LONG = "PGD-AT, no moving average", "PGD-AT, longer"
AFT, ARREST, ARREST_EMA = "AFT", "ARREST", "ARREST, moving average"
#: In the names of rows "the paper's objective" means: target and loss are the paper's; network, optimizer, schedule and
#: budget are this study's.
CARSO, CARSO_PIPELINE = "CARSO, paper's objective", "CARSO pipeline"
CARSO_ARREST = "CARSO pipeline on ARREST"
GENERATOR, ATOP = "AToP pre-trained only", "AToP, paper's objective"
ATOP_PIPELINE, ATOP_ZERO = "AToP pipeline", "AToP pipeline, sigma 0"
#: The row of AToP in the setting of the paper, whose classifiers are not robust by themselves.
ATOP_STANDARD = "AToP, paper's objective, on standard"
#: The row of CARSO attacked through PeeL, the output that CARSO's authors attack.
PEEL = "CARSO, paper's objective, through PeeL"
#: The row of AToP attacked as in the training of its authors' notebooks, where the attack sees only the classifier.
ALONE = "AToP, paper's objective, on standard, classifier attacked alone"
#: Rows that face only the attacks of the method's authors, and the name of these attacks among the protocols.
AS_AUTHORS, AUTHORS = (PEEL, ALONE), "authors"
CLASSIFIERS = (STANDARD, BASE, NO_EMA, LONG, LARGE, AWP, TRADES, AFT, ARREST_EMA, ARREST)
CARSO_ROWS = (CARSO, CARSO_PIPELINE, CARSO_ARREST, PEEL, *CANDIDATES)
#: Rows without a training of their own, each with the row whose training saves its weights.
TRAINED_AS = {PEEL: CARSO, ALONE: ATOP_STANDARD, NO_EMA: BASE, ARREST: ARREST_EMA}
#: The subfolder of a training that holds the weights without the moving average.
LIVE = "without_average"
#: The classifier behind each defence.
BEHIND = {
    CARSO: BASE,
    CARSO_PIPELINE: BASE,
    CARSO_ARREST: ARREST_EMA,
    GENERATOR: BASE,
    ATOP: BASE,
    ATOP_PIPELINE: BASE,
    ATOP_ZERO: BASE,
    ATOP_STANDARD: STANDARD,
    **dict.fromkeys(CANDIDATES, BASE),
}
#: The row of the worst outcome over all attacks, which gives the robust accuracy.
WORST = "worst"
#: The row of the best candidate, judged on test images.
BEST = "best candidate"
#: Pairs of models whose differences are shown.
PAIRS = (
    (BEST, BASE),
    (BEST, CARSO_PIPELINE),
    (CARSO, BASE),
    (CARSO_PIPELINE, BASE),
    (CARSO_PIPELINE, LARGE),
    (CARSO_ARREST, ARREST_EMA),
    (ATOP, BASE),
    (ATOP_PIPELINE, BASE),
    (ATOP_ZERO, ATOP_PIPELINE),
    (ATOP_STANDARD, STANDARD),
    (ARREST_EMA, AFT),
    (ARREST_EMA, BASE),
    (ARREST, ARREST_EMA),
    *((name, BASE) for name in (NO_EMA, LONG, LARGE, AWP, TRADES)),
)
#: Rows that are trained with further seeds too.
COMPARED = (BASE, CARSO, CARSO_PIPELINE, ATOP, ATOP_STANDARD, ATOP_PIPELINE, AFT, ARREST_EMA, ARREST, BEST)
#: Rows that the official AutoAttack attacks too.
OFFICIAL = (BASE, CARSO_PIPELINE, TRADES, ARREST_EMA)
#: Rows that are compared on held-out images, with their sources: two references, then the candidates.
TRIED = {
    BASE: "reference: no purifier",
    CARSO_PIPELINE: "reference: trained through the pipeline with cross-entropy",
    MIXED: "Bai et al., TMLR 2024, arXiv 2402.02263",
    **{name: how.source for name, how in CANDIDATES.items()},
}


#: Rows that are trained with each seed on a given base of the zoo: AToP, ARREST, and the rows that these need.
ON_GIVEN = (STANDARD, BASE, GENERATOR, ATOP, ATOP_STANDARD, ARREST_EMA, ARREST)
#: Pairs of these rows whose differences are shown.
GIVEN_PAIRS = (
    (GENERATOR, BASE),
    (ATOP, BASE),
    (ATOP_STANDARD, STANDARD),
    (ATOP, GENERATOR),
    (ARREST, ARREST_EMA),
    (ARREST, BASE),
)
#: Lambda and phi of ARREST on a given base, as the study chose them on held-out training images with the first seed.
CHOSEN = (50.0, 30.0)


def trained_as(name: str, seed: int) -> str:
    """The row whose training leaves a row's weights.

    Args:
        name: the row.
        seed: seed of the training. Only the best candidate is trained with further seeds; its weights lie in the
            folder of `BEST`.
    """
    if seed > 0 and name in ELIGIBLE:
        return BEST
    return TRAINED_AS.get(name, name)


def search_name(weight: float, angle: float) -> str:
    """The row of a pair of lambda and phi."""
    return f"ARREST search, lambda {weight:g}, phi {angle:g}"


def share_name(share: float) -> str:
    """The row of a base that was trained at a share of eps."""
    return f"PGD-AT, {share:g} eps"


def rows(budget: Budget) -> list[str]:
    """The models of the table, in order."""
    defences = [name for name in BEHIND if name not in CANDIDATES]
    return [*CLASSIFIERS, *(share_name(share) for share in budget.shares), *defences]


def judged_name(name: str, protocol: str) -> str:
    """The job in which a protocol judges a model."""
    return f"{name} by {protocol}"


def tried_name(name: str) -> str:
    """The job that judges a candidate on held-out training images."""
    return f"{name} tried"
