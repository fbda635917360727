"""The amounts of training and evaluation of the study on CIFAR-10, the names of its rows, and their relations.

A row of the table is a trained model. The base is the adversarially trained classifier with which the defences are
compared, and on which most of them are built.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

from .. import settings_of


@dataclass(frozen=True)
class Judging:
    """The number of images that each protocol attacks. The number 0 leaves a protocol out. The defaults are for a CPU.

    Attributes:
        clean: number of test images for clean accuracy.
        fast: number of test images for the protocol fast.
        standard: number of test images for the protocol standard.
        strong: number of test images for the protocol strong, which evaluates only models of the first seed.
    """

    clean: int = 10000
    fast: int = 1000
    standard: int = 0
    strong: int = 50

    def protocols(self, seed: int) -> dict[str, int]:
        """Return the protocols that evaluate the models of a seed, each with its number of images."""
        used = {self.main: getattr(self, self.main)}
        return used | ({"strong": self.strong} if seed == 0 and self.strong > 0 else {})

    @property
    def main(self) -> str:
        """The protocol by which models are compared: the protocol with the most images, or the strongest of several."""
        names = ["fast", "standard", "strong"]
        return max(names, key=lambda name: (getattr(self, name), names.index(name)))


@dataclass(frozen=True)
class Budget:
    """The amounts of training and evaluation in the whole study.

    Attributes:
        training: amounts of each training, which settings.yaml explains.
        judging: amounts of the evaluation of each model.
        shares: shares of eps at which further bases are trained.
        seeds: number of seeds with which the rows of `COMPARED` are trained.
    """

    training: SimpleNamespace
    judging: Judging = Judging()
    shares: tuple[float, ...] = (0.5,)
    seeds: int = 2


def budget_of(amount: str) -> Budget:
    """Return the budget with a name in settings.yaml."""
    other = dict(settings_of("cifar10")[amount])
    training, judging = SimpleNamespace(**other.pop("training")), Judging(**other.pop("judging", {}))
    return Budget(training, judging, **other)


EPS = 8 / 255
#: The layers of the classifier that CARSO reads: the last block of each of the classifier's last three stages.
LAYERS = ("stages.1.1", "stages.2.1", "stages.3.1")
STANDARD, BASE, LARGE, TRADES = "standard", "PGD-AT", "PGD-AT, larger", "TRADES"
NO_EMA, LONG = "PGD-AT, no moving average", "PGD-AT, longer"
AFT, ARREST, ARREST_EMA = "AFT", "ARREST", "ARREST, moving average"
#: In the names of rows, "the paper's objective" means that the training attacks the same part of the defence as in the
#: paper, and has the same loss. The network, the optimizer, the schedule and the budget are those of this study.
CARSO, CARSO_PIPELINE = "CARSO, paper's objective", "CARSO pipeline"
CARSO_ARREST, CARSO_DISTILLED = "CARSO pipeline on ARREST", "CARSO pipeline, distilled"
GENERATOR, ATOP = "AToP pre-trained only", "AToP, paper's objective"
ATOP_PIPELINE, ATOP_ZERO = "AToP pipeline", "AToP pipeline, sigma 0"
#: The row of AToP as in the paper, with a classifier that is not robust by itself.
ATOP_STANDARD = "AToP, paper's objective, on standard"
CLASSIFIERS = (STANDARD, BASE, NO_EMA, LONG, LARGE, TRADES, AFT, ARREST_EMA, ARREST)
#: For each row that shares the training of another row, the name of this other row, whose folder has the weights.
TRAINED_AS = {NO_EMA: BASE, ARREST: ARREST_EMA}
#: The name of the subfolder in which a training saves the weights that are not averaged.
LIVE = "without_average"
#: The classifier behind each defence. The defences are in the order of the table.
BEHIND = dict.fromkeys(
    (CARSO, CARSO_PIPELINE, CARSO_ARREST, GENERATOR, ATOP, ATOP_PIPELINE, ATOP_ZERO, ATOP_STANDARD, CARSO_DISTILLED),
    BASE,
) | {CARSO_ARREST: ARREST_EMA, ATOP_STANDARD: STANDARD}
#: Pairs of models whose differences are shown.
PAIRS = (
    (CARSO_DISTILLED, BASE),
    (CARSO_DISTILLED, CARSO_PIPELINE),
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
    *((name, BASE) for name in (NO_EMA, LONG, LARGE, TRADES)),
)
#: Rows that are trained and evaluated with all seeds.
COMPARED = (BASE, CARSO, CARSO_PIPELINE, ATOP, ATOP_STANDARD, ATOP_PIPELINE, AFT, ARREST_EMA, ARREST, CARSO_DISTILLED)


def share_name(share: float) -> str:
    """Return the name of the row for a base that is trained at a share of eps."""
    return f"PGD-AT, {share:g} eps"


def rows(budget: Budget) -> list[str]:
    """Return the names of the table's rows, in order."""
    return [*CLASSIFIERS, *(share_name(share) for share in budget.shares), *BEHIND]


def judged_name(name: str, protocol: str) -> str:
    """Return the name of the job that evaluates a model by a protocol."""
    return f"{name} by {protocol}"
