"""Settings of the methods that cannot be used: each is refused by an error that names it."""

import pytest
from small_models import configured

from purify_fast.methods.arrest import ArrestConfig
from purify_fast.methods.atop import Atop, AtopConfig, SmallGenerator
from purify_fast.methods.carso import CarsoConfig
from purify_fast.methods.diffusion import DiffusionConfig
from purify_fast.models.classifiers import SmallCNN


def arrest(**options):
    return configured(ArrestConfig, **{"alpha": 2 / 255, **options})


def atop(**options):
    return configured(AtopConfig, **options)


def carso(**options):
    return configured(CarsoConfig, **options)


def atop_defence(**options):
    return Atop(SmallCNN(width=4), SmallGenerator(1, width=2), (1, 16, 16), **{"block": 4, **options})


PIPELINE = {"attack_target": "pipeline", "joint": True}
#: Classes, settings that each of them refuses, and the words of the error.
REFUSED = {
    arrest: [
        ({"eps": 0.0}, "eps must be above 0, got 0.0"),
        ({"eps": 0.3}, r"alpha must be at least .* = 0.03, got 0.007843: .* reach 0.07843 of eps 0.3.* = 0.075"),
        ({"eps": 0.2, "steps": 1}, "alpha must be at least .* = 0.2, got 0.007843"),
        ({"distillation_weight": -1.0}, "distillation_weight must be at least 0, got -1.0"),
        ({"distillation_weight": float("nan")}, "distillation_weight must be at least 0, got nan"),
        ({"replay_share": -0.5}, r"replay_share must be in \[0, 1\], got -0.5"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"angle": 91.0}, r"angle must be in \[0, 90\] degrees, got 91.0"),
        ({"tau": -0.1}, "tau must be at least 0, got -0.1"),
        ({"norm": "l2"}, "replay needs norm 'linf', .*got 'l2'"),
        ({"distance": "l2"}, "tau must be given for distance='l2', got None"),
    ],
    atop: [
        ({"attack_method": "cw"}, "attack_method must be one of fgsm, pgd, none, got 'cw'"),
        ({"eps": 0.0}, "eps must be above 0, got 0.0"),
        ({"attack_method": "none", "attack_target": "pipeline"}, "needs an attack"),
        ({"cls_weight": -1.0}, "cls_weight must be at least 0, got -1.0"),
        ({"betas": (0.5, 1.0)}, r"each of betas must be in \[0, 1\), got 1.0"),
        ({"betas": (0.5,)}, r"betas must have 2 values, got \(0.5,\)"),
        ({"gan_weight": 0.5}, "gan_weight needs gan_grad=True.* got gan_weight=0.5"),
        ({"reconstruction_target": "x"}, "reconstruction_target must be one of adversarial, clean"),
        ({"steps": 7}, "steps=7 needs attack_method='pgd'"),
        ({"attack_method": "none", "alpha": 0.1}, "alpha=0.1 needs attack_method='pgd', got attack_method='none'"),
    ],
    DiffusionConfig: [
        ({"prediction": "eps"}, "prediction must be one of noise, x0, v, got 'eps'"),
        ({"noise_schedule": "x"}, "noise_schedule must be one of linear, cosine, vp, got 'x'"),
        ({"last_time": 0.0}, r"last_time must be in \(0, 1\], got 0.0"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\), got 1.0"),
    ],
    atop_defence: [
        ({"transform": "rt4"}, "transform must be one of rt1, rt2, rt3, got 'rt4'"),
        ({"aggregation": "lse"}, "aggregation must be one of mean, mean_softmax, got 'lse'"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"block": 2.7}, "block must be a whole number, got 2.7"),
        ({"block": 5}, "block"),
        ({"mask_ratio": 1.0}, r"mask_ratio must be in \[0, 1\), got 1.0"),
        ({"sigma": -0.1}, "sigma must be finite and not negative, got -0.1"),
        ({"transform": "rt3", "num_passes": 3}, "num_passes must be .* 16 blocks.*got 3"),
    ],
    carso: [
        ({"attack_target": "both"}, "attack_target must be one of classifier, pipeline"),
        ({"attack_target": "pipeline", "reduction": "sum"}, "reduction 'sum' needs attack_target='classifier'"),
        ({"attack_target": "pipeline", "eps_mode": "official_code"}, "eps_mode 'official_code' needs attack_target"),
        ({"lookahead_steps": 0}, "lookahead_steps must be at least 1"),
        ({"eps": 0.0}, "eps must be above 0"),
        ({"train_samples": 0}, "train_samples must be at least 1"),
        ({"adversarial_fraction": 1.5}, r"adversarial_fraction must be in \[0, 1\]"),
        ({"attack_target": "pipeline", "free_bits": 2.0}, r"free_bits 2\.0 needs attack_target='classifier'"),
        ({"joint": True}, "attack_target must be 'pipeline' if joint=True"),
        ({"targets": "classifier"}, "attack_target must be 'pipeline' if .*targets='classifier'"),
        (PIPELINE | {"targets": "classifier"}, "no frozen classifier, got .*'classifier'"),
        (PIPELINE | {"precision": "bfloat16"}, "no frozen classifier, got .*'bfloat16'"),
        ({"random_start": False}, "random_start=True and start_std=None"),
        ({"kl_delay": 1.0}, r"kl_delay must be in \[0, 1\) as a share of the epochs, got 1.0"),
        ({"kl_delay": -1.0, "kl_delay_unit": "steps"}, "kl_delay must be at least 0 and finite, got -1.0"),
        ({"lookahead_alpha": 0.0}, r"lookahead_alpha must be in \(0, 1\], got 0.0"),
    ],
}


@pytest.mark.parametrize(
    ("make", "options", "message"), [(make, *row) for make, rows in REFUSED.items() for row in rows]
)
def test_settings_that_cannot_be_used(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
