"""The models that come with the package are what their cards say."""

import pytest
import torch

from purify_fast import cli, zoo
from purify_fast.attacks import frozen, pgd
from purify_fast.data import load_dataset, to_float

IMAGES = 100
DIGITS = [name for name in zoo.list() if zoo.card(name).data == "digits"]


@pytest.fixture(scope="module")
def digits():
    data = load_dataset("digits")
    return to_float(data.x_test[:IMAGES]), data.y_test[:IMAGES]


def test_there_are_five_or_more_and_they_are_small():
    sizes = {name: sum(f.stat().st_size for f in zoo.folder(name).rglob("*") if f.is_file()) for name in zoo.list()}
    assert len(sizes) >= 5 and max(sizes.values()) <= 3_000_000 and sum(sizes.values()) <= 21_000_000


@pytest.mark.parametrize("name", zoo.list())
def test_a_model_loads_and_its_card_says_how_it_was_made(name):
    card, model = zoo.card(name), zoo.load(name)
    assert card.name == name and not model.training
    logits = model(torch.rand(2, *card.image_shape))
    assert logits.shape[0] == 2 and logits.isfinite().all()
    text = str(card)
    assert card.training in text and "If you get it lower" in text and ("objective alone" in text) == card.study_only
    # A random model is on its card only with numbers of the present rule.
    assert card.attacked or card.method not in ("classifier", "ARREST")
    assert all(0 <= accuracy.share <= 1 for accuracy in card.attacked.values())
    assert ("Attacks: not measured since" in text) == (not card.attacked)


@pytest.mark.parametrize("name", DIGITS)
def test_clean_accuracy_is_the_cards(name, digits):
    x, y = digits
    card, model = zoo.card(name), zoo.load(name)
    torch.manual_seed(0)
    with torch.no_grad():
        accuracy = (model(x).argmax(1) == y).float().mean().item()
    both = (card.clean.standard_error**2 + card.clean.share * (1 - card.clean.share) / IMAGES) ** 0.5
    assert abs(accuracy - card.clean.share) <= 3 * both


@pytest.mark.parametrize("name", DIGITS)
def test_an_attack_of_a_few_steps_leaves_no_less_than_the_card_says(name, digits):
    """A card that a quick attack refutes would be wrong."""
    x, y = digits
    card, model = zoo.card(name), zoo.load(name)
    with frozen(model), torch.no_grad():
        found = pgd(model, x, y, eps=card.eps, steps=5)
        attacked = (model(found).argmax(1) == y).float().mean().item()
    assert attacked < card.clean.share
    # The numbers of a smoothed classifier are not those of its network.
    if card.attacked and card.sigma is None:
        share = min(accuracy.share for accuracy in card.attacked.values())
        assert attacked >= share - 3 * (max(share * (1 - share), 0.01) / IMAGES) ** 0.5


def test_purifiers_by_diffusion_know_up_to_which_time_they_were_trained():
    trained = [card for card in map(zoo.card, zoo.list()) if card.method == "diffusion"]
    assert len(trained) >= 6
    for card in trained:
        assert f"--last-time {zoo.load(card.name).last_time:g} " in card.training


def test_a_defence_and_its_classifier_are_models_of_their_own():
    assert zoo.classifier_folder("digits-carso-pipeline") == zoo.folder("digits-pgd-at")
    with pytest.raises(ValueError, match="name must be a defence of the zoo, got 'digits-pgd-at'"):
        zoo.classifier_folder("digits-pgd-at")


def test_the_command_line_lists_and_evaluates(tmp_path, monkeypatch, capsys, short_signs):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["zoo"]) == 0
    # a number that cannot be believed is marked in the list as well
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    cards = map(zoo.card, zoo.list())
    unreliable = {card.name for card in cards if any(not it.reliable for it in card.attacked.values())}
    assert unreliable and {name for name in zoo.list() if " ?" in lines[name]} == unreliable
    small = ["--images", "10", "--steps", "2", "--protocol", "fast", "--device", "cpu"]
    assert cli.main(["evaluate", "zoo:digits-arrest", *small]) == 0
    assert (tmp_path / "runs/zoo/digits-arrest/evaluation/report.md").is_file()
    with pytest.raises(ValueError, match="name must be a model of the zoo, got 'nothing'"):
        zoo.load("nothing")
