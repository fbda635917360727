"""Recipes: their numbers over the whole schedule, two steps of each, and that every term of the loss acts."""

import dataclasses
import re
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from small_models import SMALL, first_digits, smaller
from small_runs import StopAt, Stopped, arrest_task, atop_task, carso_task

from purify_fast import data, methods
from purify_fast.data import DataSet
from purify_fast.methods.arrest.recipes import ArrestRecipe
from purify_fast.methods.atop import DeepFillGenerator
from purify_fast.methods.atop.defence import _block
from purify_fast.methods.atop.task import AtopRecipe
from purify_fast.methods.carso.method import TrainCarso
from purify_fast.methods.carso.recipes import CarsoRecipe
from purify_fast.methods.carso.task import config_in_epoch, kl_weight
from purify_fast.methods.recipes import all_recipes, recipe
from purify_fast.models import PreActResNet18, build_classifier
from purify_fast.training import Batch, FitConfig, fit
from purify_fast.training.run import read_tree
from purify_fast.training.sources import InMemory
from purify_fast.training.task import RunLength

RECIPES = all_recipes()
METHODS_FOLDER = Path(methods.__file__).parent
#: Those that have a training.
TRAINED = [name for name in RECIPES if not name.startswith("diffusion/")]
#: Images of the training sets.
IMAGES = {"cifar10": 50_000, "cifar100": 50_000, "tiny_imagenet": 100_000, "mnist": 60_000, "imagenette": 9_469}
PEAK = 0.064  # carso: 1e-4 times 640 images of one process (train_a.py:234, carsotrain_a.sh:7)

#: By recipe: steps of an epoch, and by step of the run (rate, the delayed term's weight). For CARSO beta: 0 for 25
#: epochs, then up in 9 (train_a.py:59-61). For AToP lambda: 0 for 2 epochs of 625 steps (cifar-miss-gau-adv.ipynb:214,
#: 285), without a delay in rt1 (cifar-miss-adv.ipynb:211). For ARREST the weight of the distillation (FAT).
SCHEDULES = {
    # 10 steps: ceil(50,000 / 5,120), as the last batch is kept; rates of ebtorch's warmed_up_linneal
    "carso/cifar10": (10, {0: (5e-9, 0), 249: (PEAK * 24 / 25, 0), 260: (PEAK, 1 / 9), 340: (PEAK, 1)}),
    "carso/cifar100": (20, {0: (5e-9, 0), 519: (PEAK, 0), 520: (PEAK, 1 / 9), 2500: (PEAK / 2, 1)}),
    # 250 epochs: 31 up, 31 flat, 188 down; beta 0 for 32 epochs, then up in 11
    "carso/tiny_imagenet": (98, {0: (5e-9, 0), 98 * 31: (0.0128, 0), 98 * 33: (0.0128, 1 / 11), 98 * 156: (0.0064, 1)}),
    "atop/cifar_rt1": (101, {0: (1e-4, 0.05), 30_299: (1e-4, 0.05)}),
    "atop/cifar_rt2": (625, {0: (1e-4, 0), 1249: (1e-4, 0), 1250: (1e-4, 0.05), 187_499: (1e-4, 0.05)}),
    "atop/logged": (625, {0: (1e-4, 0), 1250: (1e-4, 0.05)}),
    "atop/imagenette": (625, {1249: (1e-4, 0), 1250: (1e-4, 0.1)}),
    "atop/imagenette_rt1": (101, {0: (1e-4, 0.05)}),
    # 391 steps: ceil(50,000 / 128); the rates of the port's list by epoch
    "arrest/resnet18": (391, {0: (0.025, 50), 391 * 11: (0.02, 50), 391 * 13: (0.01, 50), 7819: (0.00125, 50)}),
    "arrest/wrn_34_10": (391, {391 * 10: (0.025, 50), 391 * 17: (0.0025, 50)}),
}
#: By recipe: batch, and eps, steps and alpha of the attack; of CARSO eps as the paper and as the code has it.
ATTACKS = {
    "carso/cifar10": (5120, 8 / 255, 40, 0.01, 0.1251232),
    "carso/cifar100": (2560, 8 / 255, 40, 0.01, 0.1176618),
    "carso/tiny_imagenet": (1024, 8 / 255, 40, 0.01, 0.1378205),
    **{name: (8, 8 / 255, None, None, 8 / 255) for name in RECIPES if name.startswith("atop/")},
    **{name: (128, 8 / 255, 10, 2 / 255, 8 / 255) for name in RECIPES if name.startswith("arrest/")},
}


def narrow(made):
    return smaller(made, {"classifier.width": 1})


def built(name, official_code=False, image_shape=None, **settings):
    """The recipe with small networks, and its task."""
    torch.manual_seed(0)
    made = recipe(name)
    if image_shape is not None:
        made = smaller(made, {"data.image_shape": image_shape})
    if isinstance(made, CarsoRecipe):
        sizes = SMALL if made["classifier.name"] == "wide_resnet" else {}
        made = smaller(made, sizes)
        task = made.task(made.defence(made.build_classifier()), official_code)
    elif isinstance(made, AtopRecipe):
        # The attack on 256 x 256 pixels is not tested here, so the classifier sees 16 x 16 averages.
        classifier = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(16), torch.nn.Flatten(), torch.nn.Linear(768, 10))
        # the code's form has no discriminator, whose width is then its default
        made = made if official_code else smaller(made, {"method.discriminator_width": 2})
        task = made.task(made.defence(classifier, DeepFillGenerator(5, 4), official_code), official_code)
    else:
        network = build_classifier("preact_resnet18", made.image_shape, 10, width=2)
        task = made.task(narrow(made).build_classifier() if "wrn" in name else network, official_code)
    if settings:
        task.config = dataclasses.replace(task.config, **settings)
    return made, task


def length_of(made):
    """The whole run's length, on as many images as the data set has."""
    blank = torch.zeros(IMAGES[made["data.name"]], 1, 1, 1, dtype=torch.uint8)
    config = made.loop()
    source = InMemory(blank, torch.zeros(len(blank), dtype=torch.int64), config, blank.device)
    return RunLength(config.epochs, source.steps, source.batch_size, source.images)


def weight_of(task, step, length):
    """The weight of the delayed term at a step."""
    epoch = step // length.steps_per_epoch
    batch = Batch(*[torch.empty(0)] * 3, 0, epoch, length.epochs, step, length.images_before(step))
    config = task.config
    if hasattr(config, "cls_weight"):
        return config.cls_weight if batch.progress_in(config.cls_delay_unit) >= config.cls_delay else 0.0
    if hasattr(config, "beta"):
        return config.beta * kl_weight(batch.epoch, config.kl_delay * length.epochs)
    return config.distillation_weight


def test_every_recipe_is_compared_and_lists_are_complete():
    assert set(SCHEDULES) == set(ATTACKS) == set(TRAINED)
    wanted = {"carso/cifar10", "carso/cifar100", "carso/tiny_imagenet", "atop/cifar_rt1"}
    wanted |= {"atop/cifar_rt2", "atop/logged", "atop/imagenette", "arrest/resnet18", "arrest/wrn_34_10"}
    assert wanted <= set(RECIPES)
    with pytest.raises(ValueError, match=r"recipe must be one of arrest/resnet18, .*, got 'cifar10'"):
        recipe("cifar10")


@pytest.mark.parametrize("name", SCHEDULES)
def test_rates_and_weights_over_the_whole_schedule(name):
    made, task = built(name)
    length, (steps, points) = length_of(made), SCHEDULES[name]
    assert length.steps_per_epoch == steps
    for step, (rate, weight) in points.items():
        epoch = step // steps
        assert task.learning_rate(step / length.steps, epoch, length.epochs) == pytest.approx(rate, rel=2e-4), step
        assert weight_of(task, step, length) == pytest.approx(weight, abs=1e-9), step
    # the delayed term acts from the first step at which its weight is above 0, and is not refused
    acts = task.terms(length)
    every = range(0, length.steps, 1 if steps > 200 else steps)
    first = min(step for step in every if weight_of(task, step, length) > 0)
    assert max(acts.values(), default=0) == first


@pytest.mark.parametrize("name", ATTACKS)
def test_batches_and_attacks(name):
    made, (batch, eps, steps, alpha, official) = recipe(name), ATTACKS[name]
    config = made.config()
    built(name, official_code=True)
    assert made.loop().batch_size == batch
    if isinstance(made, CarsoRecipe):
        std = made["data.std"]
        assert config_in_epoch(made.config(True), std).attack.eps == pytest.approx(official, abs=1e-7)
        config = config_in_epoch(config, std)
    assert config.attack.eps == pytest.approx(eps)
    if steps is None:
        assert config.attack_method == "fgsm" and config.attack_target == "classifier"
    else:
        assert (config.attack.steps, config.attack.step_size(config.attack.eps)) == (steps, pytest.approx(alpha))


def test_a_printed_recipe_has_every_value_and_every_value_has_a_grade_and_a_source():
    for name, made in RECIPES.items():
        (printed,) = yaml.safe_load(str(made)).values()
        as_printed = {key: list(value) if isinstance(value, tuple) else value for key, value in made.values.items()}
        assert printed == {"title": made.title, **as_printed, "official_code": made.official}, name
        assert made.official.keys() <= made.values.keys() and made["not_reproduced"]
    grade = re.compile(r"# (code|paper|second-hand|inferred): \S")
    for path in METHODS_FOLDER.glob("*/recipes.yaml"):
        lines, noted = path.read_text(encoding="utf-8").splitlines(), False
        for line in lines:
            if line.startswith("  # "):
                # The comment of the next value may have several lines.
                noted = noted or bool(grade.search(line))
            elif re.match(r"  [\w.]+:", line):
                free = line.split(":")[0].strip() in ("title", "official_code", "not_reproduced")
                assert free or noted or grade.search(line), f"{path}: {line}"
                noted = False


def test_official_code_reproduces_the_quirks():
    atop = recipe("atop/cifar_rt2")
    assert atop.config(True).classifier_range == "doubled" and atop.config().classifier_range == "unit"
    assert atop.config().gan_grad and not atop.config(True).gan_grad
    assert atop.part("defence", True)["shared_mask"] and not atop.part("defence")["shared_mask"]
    shares = {"cifar10": 0.5, "cifar100": 0.15, "tiny_imagenet": 0.01}
    carso = {name: recipe(f"carso/{name}") for name in shares}
    assert {name: made.config().adversarial_fraction for name, made in carso.items()} == shares
    # With tiny_imagenet, a process has so few images that an attack may get none.
    assert [made.config(True).allow_no_adversarial for made in carso.values()] == [False, False, True]
    assert [made["loop.batch_size"] // made["run.processes"] for made in carso.values()] == [640, 640, 128]
    assert not recipe("carso/cifar10").loop().drop_last
    arrest = recipe("arrest/resnet18").config(True)
    assert arrest.attack.start_std == 0.001 and arrest.pooled and arrest.drift_mode == "train"
    assert isinstance(recipe("arrest/wrn_34_10"), ArrestRecipe)
    assert narrow(recipe("arrest/wrn_34_10")).build_classifier().arguments["activation"] == "relu"


def test_a_recipe_for_images_of_ones_own():
    """Three classes, grey, 16 x 24 pixels. tests/cli/test_commands.py trains on such images."""
    own = [recipe(name).for_data((1, 16, 24), 3).for_batch(8) for name in ("carso/cifar10", "atop/cifar_rt2")]
    classifier = build_classifier("wide_resnet", (1, 16, 24), 3, depth=10, width=1)
    carso = own[0].defence(classifier, cond_dim=6, latent_dim=4, samples=2, decoder_width=2)
    # the rate is 1e-4 times the images of a process in a batch of 8 times as many
    assert own[0].config().learning_rate == pytest.approx(1e-4) and own[0].loop().batch_size == 8
    assert carso.arguments["mean"] == [0.5] and carso.arguments["layers"] == classifier.representation_layers()
    assert own[1].defence(classifier, DeepFillGenerator(3, 4)).block == 2


def test_the_published_block_is_the_default_for_images_of_the_published_size():
    """So another size has the default, which is the same share of the image."""
    for name in [name for name in TRAINED if name.startswith("atop")]:
        assert recipe(name)["defence.block"] == _block(recipe(name).image_shape)


# -- A training of each method that is killed in the middle of an epoch, and goes on, ends with the same weights -------


arrest = partial(arrest_task, network=partial(PreActResNet18, in_channels=1))
atop = partial(atop_task, cls_delay=1, learning_rate=1e-3)
carso = partial(carso_task, kl_delay=0.0)
FINETUNED = {"optimizer": "adamw", "schedule": "one_cycle", "learning_rate": 1e-2, "ema_decay": 0.5}
TASKS = {
    "arrest": arrest,
    "arrest, average": partial(arrest, ema_decay=0.9),
    "arrest, bfloat16": partial(arrest, precision="bfloat16", drift_mode="train"),
    "arrest, AdamW": partial(arrest_task, **FINETUNED),
    "atop": atop,
    "atop, discriminator": partial(atop, gan_grad=True, discriminator_width=2),
    "carso": partial(carso, optimizer="radam_lookahead", lookahead_steps=2),
    "carso, pipeline": partial(carso, "pipeline"),
}


def trained(name, folder, *callbacks):
    """The checkpoint and the result of six steps."""
    torch.manual_seed(0)
    task, config = TASKS[name](), FitConfig(2, 8, 3, checkpoint_seconds=0)
    fit(task, *first_digits(24), config, folder, callbacks=callbacks)
    return read_tree(folder / "checkpoint.safetensors"), task.result.state_dict()


#: Their parts are those of other trainings here.
SLOW = ("arrest, average", "arrest, AdamW", "atop, discriminator")


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in TASKS])
def test_killed_and_resumed_training_is_the_same(name, tmp_path):
    one, whole = trained(name, tmp_path / "whole")
    with pytest.raises(Stopped):
        trained(name, tmp_path / "cut", StopAt(5))
    two, resumed = trained(name, tmp_path / "cut")
    assert one["step"] == two["step"] == 6 and one["last"] == two["last"] and one["model"].keys() == two["model"].keys()
    assert all(torch.equal(value, two["model"][key]) for key, value in one["model"].items())
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())


def test_held_out_images_get_the_same_noise_from_any_number_of_processes(monkeypatch):
    made, digits = carso("pipeline"), data.load_dataset("digits")
    batch = Batch(digits.x_test[:8].float() / 255, digits.y_test[:8], torch.arange(8), seed=1, whole=True)
    torch.manual_seed(1)
    alone = made.validate(batch)
    torch.manual_seed(1)
    monkeypatch.setattr("purify_fast.methods.purifier_task.processes", lambda: (0, 2))
    assert made.validate(batch) == alone


@pytest.mark.parametrize("name", ["cifar10", "carso/cifar10"])
def test_the_command_trains_the_system_that_its_recipe_names(name):
    x, y = torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8), torch.arange(12) % 3
    training = TrainCarso(recipe=name, layers=("act",), cond_dim=4, latent_dim=3, samples=2)
    classifier = build_classifier("preact_resnet18", (3, 16, 16), 3, width=2)
    defence = training.task(DataSet(x, y, x, y, "small", 3), classifier).defence
    sizes = {"layers": ["act"], "image_shape": [3, 16, 16], "cond_dim": 4, "latent_dim": 3, "samples": 2}
    assert defence.arguments.items() >= sizes.items()
    # The images are not the recipe's, so their own statistics normalize them.
    assert defence.arguments["mean"] == pytest.approx((x / 255).mean((0, 2, 3)).tolist(), abs=1e-6)
