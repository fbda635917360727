"""Settings of the methods that cannot be used: each is refused by an error that names it."""

import pytest
import small_models
from small_models import configured

from purify_fast.methods.arrest import ArrestConfig
from purify_fast.methods.atop import AtopConfig
from purify_fast.methods.carso import CarsoConfig
from purify_fast.training import ClassifierConfig, FitConfig


def arrest(**options):
    return configured(ArrestConfig, **{"alpha": 2 / 255, **options})


def atop(**options):
    return configured(AtopConfig, **options)


def carso(**options):
    return configured(CarsoConfig, **options)


def classifier(**options):
    return configured(ClassifierConfig, **options)


#: Classes, settings that each of them refuses, and the words of the error.
REFUSED = {
    arrest: [
        ({"eps": 0.0}, "eps must be above 0, got 0.0"),
        ({"distillation_weight": float("nan")}, "distillation_weight must be at least 0, got nan"),
        ({"angle": 91.0}, r"angle must be in \[0, 90\] degrees, got 91.0"),
        ({"norm": "l2"}, "replay draws noise in a ball of norm 'linf', got 'l2'"),
        ({"distance": "l2"}, "tau must be given for distance='l2'"),
    ],
    atop: [
        ({"eps": 0.0}, "eps must be above 0, got 0"),
        ({"attack_method": "none", "attack_target": "pipeline"}, "attack_target needs an attack_method"),
        ({"betas": (0.5, 1.0)}, r"each of betas must be in \[0, 1\), got 1.0"),
        ({"gan_weight": 0.5}, "gan_weight needs gan_grad=True, got gan_weight=0.5"),
        ({"steps": 7}, "steps needs attack_method='pgd', got steps=7"),
        ({"attack_method": "none", "alpha": 0.1}, "alpha needs attack_method='pgd', got alpha=0.1"),
    ],
    small_models.atop: [
        ({"transform": "rt4"}, "transform must be one of rt1, rt2, rt3, got 'rt4'"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"block": 5}, "block"),
        ({"mask_ratio": 1.0}, r"mask_ratio must be in \[0, 1\), got 1.0"),
        ({"sigma": -0.1}, "sigma must be finite and not negative, got -0.1"),
        ({"transform": "rt3", "num_passes": 3}, "num_passes must be .* 16 blocks.*got 3"),
    ],
    carso: [
        ({"attack_target": "pipeline", "reduction": "sum"}, "reduction needs attack_target='classifier', got .*'sum'"),
        ({"eps": 0.0}, "eps must be above 0"),
        ({"targets": "classifier"}, "targets needs attack_target='pipeline'"),
        ({"random_start": False}, "random_start needs attack_target='pipeline'"),
        ({"kl_delay": 1.0}, r"kl_delay must be in \[0, 1\), got 1.0"),
        ({"beta": "1"}, "beta must be a number, got '1'"),
    ],
    CarsoConfig: [({"attack": 0.1}, "attack must be an object of TrainingAttack, got 0.1")],
    FitConfig: [
        ({"epochs": 2.5}, "epochs must be a whole number, got 2.5"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"epochs": 2, "drop_last": "no"}, "drop_last must be True or False, got 'no'"),
    ],
    classifier: [
        ({"learning_rate": 0.0}, "learning_rate must be above 0 and finite, got 0.0"),
        ({"eps": 0.0, "objective": "trades"}, "objective 'trades' needs attacked images: eps must be above 0"),
        ({"eps": 0.1, "beta": 2.0}, r"beta needs the objective .* got beta=2"),
    ],
}


@pytest.mark.parametrize(
    ("make", "options", "message"), [(make, *row) for make, rows in REFUSED.items() for row in rows]
)
def test_settings_that_cannot_be_used(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
