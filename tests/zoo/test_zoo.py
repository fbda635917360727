"""The models that come with the package are what their cards say."""

import hashlib
import shutil
import threading
from email.message import Message
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

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


NAME = "digits-standard"
#: The address in the sources.
PLACEHOLDER = Message()
PLACEHOLDER["Project-URL"] = "Repository, https://github.com/ADDRESS"
PACKED = zoo.MODELS


@pytest.fixture
def without_weights(tmp_path, monkeypatch):
    """An installed package: the cards alone, and an empty cache. The file that a download is kept in."""
    shutil.copytree(PACKED, tmp_path / "models", ignore=shutil.ignore_patterns("*.safetensors"))
    monkeypatch.setattr(zoo, "MODELS", tmp_path / "models")
    monkeypatch.setenv("PURIFY_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "zoo" / NAME / "model.safetensors"


@pytest.fixture
def release(tmp_path, monkeypatch):
    """A web server with the files of a release: its folder, and the list of the paths that were asked for."""
    folder, asked = tmp_path / "release", []
    folder.mkdir()

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_request(self, code="-", size="-"):
            asked.append((self.path, int(code)))

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setattr(zoo, "address", lambda name: f"http://127.0.0.1:{server.server_port}/{name}.safetensors")
        yield folder, asked
        server.shutdown()
        thread.join()


def test_a_card_has_the_size_and_the_hash_of_the_weights():
    for name in zoo.list():
        card, weights = zoo.card(name), (zoo.folder(name) / "model.safetensors").read_bytes()
        assert (card.size, card.sha256) == (len(weights), hashlib.sha256(weights).hexdigest()), name


def test_missing_weights_are_downloaded_once_and_said(without_weights, release, capsys):
    folder, asked = release
    # The list and the cards need no weights.
    assert zoo.card(NAME).name == NAME and len(zoo.list()) > 20 and not asked
    shutil.copy(PACKED / NAME / "model.safetensors", folder / f"{NAME}.safetensors")
    model = zoo.load(NAME)
    said = capsys.readouterr().err
    assert f"downloads the model {NAME} (334,400 bytes) from {zoo.address(NAME)} to {without_weights}\n" in said
    assert asked == [(f"/{NAME}.safetensors", 200)]
    again = zoo.load(NAME)
    assert len(asked) == 1 and capsys.readouterr().err == ""
    x = torch.rand(2, *zoo.card(NAME).image_shape)
    assert torch.equal(model(x), again(x)) and zoo.folder(NAME) == without_weights.parent


def test_weights_beside_their_card_are_not_downloaded(release, monkeypatch, tmp_path):
    monkeypatch.setenv("PURIFY_FAST_CACHE", str(tmp_path / "cache"))
    assert zoo.folder(NAME) == PACKED / NAME and not release[1] and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"\0", lambda data: b"\0" + data[1:]])
def test_other_weights_are_refused(change, without_weights, release):
    folder, asked = release
    right = (PACKED / NAME / "model.safetensors").read_bytes()
    wrong = change(right)
    (folder / f"{NAME}.safetensors").write_bytes(wrong)
    sums = rf"SHA-256 must be {zoo.card(NAME).sha256}, got "
    with pytest.raises(ValueError, match=rf"safetensors is not the file of the zoo's model {NAME}: {sums}"):
        zoo.load(NAME)
    # The wrong file is not kept.
    assert len(asked) == 1 and not list(without_weights.parent.parent.rglob("*"))
    # A damaged file in the cache is refused too, and nothing replaces it silently.
    without_weights.parent.mkdir(parents=True)
    without_weights.write_bytes(wrong)
    with pytest.raises(ValueError, match=rf"^{without_weights} is not .* {sums}{hashlib.sha256(wrong).hexdigest()}"):
        zoo.folder(NAME)
    assert len(asked) == 1 and without_weights.read_bytes() == wrong
