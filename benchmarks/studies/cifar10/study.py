"""The rows of the study on CIFAR-10, by name, and what they have to do with each other."""

from __future__ import annotations

from .budget import Budget
from .candidates import CANDIDATES, ELIGIBLE, MIXED

EPS = 8 / 255
#: What CARSO reads of the classifier: the blocks that end its last three stages.
LAYERS = ("stages.1.1", "stages.2.1", "stages.3.1")
STANDARD, BASE, LARGE, AWP, TRADES = "standard", "PGD-AT", "PGD-AT, larger", "PGD-AT, AWP", "TRADES"
NO_EMA, LONG = "PGD-AT, no moving average", "PGD-AT, longer"
AFT, ARREST, ARREST_EMA = "AFT", "ARREST", "ARREST, moving average"
#: "The paper's objective": target and loss are the paper's; network, optimizer, schedule and budget are this study's.
CARSO, CARSO_PIPELINE = "CARSO, paper's objective", "CARSO pipeline"
CARSO_ARREST = "CARSO pipeline on ARREST"
GENERATOR, ATOP = "AToP pre-trained only", "AToP, paper's objective"
ATOP_PIPELINE, ATOP_ZERO = "AToP pipeline", "AToP pipeline, sigma 0"
#: The setting of the paper, whose classifiers are not robust by themselves.
ATOP_STANDARD = "AToP, paper's objective, on standard"
#: CARSO attacked through the output that its authors attack.
PEEL = "CARSO, paper's objective, through PeeL"
#: AToP attacked as its notebooks do while they train: the attack sees the classifier alone.
ALONE = "AToP, paper's objective, on standard, classifier attacked alone"
#: Rows that are attacked as the method's authors do, and no otherwise; their place among the protocols.
AS_AUTHORS, AUTHORS = (PEEL, ALONE), "authors"
CLASSIFIERS = (STANDARD, BASE, NO_EMA, LONG, LARGE, AWP, TRADES, AFT, ARREST_EMA, ARREST)
CARSO_ROWS = (CARSO, CARSO_PIPELINE, CARSO_ARREST, PEEL, *CANDIDATES)
#: Rows whose weights another row's training leaves.
TRAINED_AS = {PEEL: CARSO, ALONE: ATOP_STANDARD, NO_EMA: BASE, ARREST: ARREST_EMA}
#: Where a training keeps the weights that its moving average is of.
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
#: The row that counts.
WORST = "worst"
#: The row of the best candidate, judged on test images.
BEST = "best candidate"
#: Models whose differences to another one are shown.
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
#: What is trained with a second seed.
COMPARED = (BASE, CARSO, CARSO_PIPELINE, ATOP, ATOP_STANDARD, ATOP_PIPELINE, AFT, ARREST_EMA, ARREST, BEST)
#: What the official AutoAttack attacks as well.
OFFICIAL = (BASE, CARSO_PIPELINE, TRADES, ARREST_EMA)
#: What is tried on held-out images, and its source: two references, then the candidates.
TRIED = {
    BASE: "reference: no purifier",
    CARSO_PIPELINE: "reference: trained through the pipeline with cross-entropy",
    MIXED: "Bai et al., TMLR 2024, arXiv 2402.02263",
    **{name: how.source for name, how in CANDIDATES.items()},
}


#: What is trained on a base that is given, with each seed: the rows whose training was wrong, and what they need.
ON_GIVEN = (STANDARD, BASE, GENERATOR, ATOP, ATOP_STANDARD, ARREST_EMA, ARREST)
#: Models of these whose differences are shown.
GIVEN_PAIRS = (
    (GENERATOR, BASE),
    (ATOP, BASE),
    (ATOP_STANDARD, STANDARD),
    (ATOP, GENERATOR),
    (ARREST, ARREST_EMA),
    (ARREST, BASE),
)
#: Lambda and phi of ARREST there: those that the study chose on held-out training images with the first seed.
CHOSEN = (50.0, 30.0)


def trained_as(name: str, seed: int) -> str:
    """The row whose training leaves a row's weights.

    Args:
        name: the row.
        seed: of the training. Of the candidates, only the best one is trained with further seeds; its weights lie in
            the folder of `BEST`.
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
    """The models of the table, in its order."""
    defences = [name for name in BEHIND if name not in CANDIDATES]
    return [*CLASSIFIERS, *(share_name(share) for share in budget.shares), *defences]


def judged_name(name: str, protocol: str) -> str:
    """The job in which a protocol judges a model."""
    return f"{name} by {protocol}"


def tried_name(name: str) -> str:
    """The job that judges a candidate on held-out training images."""
    return f"{name} tried"
