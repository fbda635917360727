"""Weights that are not beside their cards are downloaded once, compared with the card's SHA-256, and kept."""

import hashlib
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from purify_fast import cli, zoo
from purify_fast.zoo import cards

NAME = "digits-standard"
PACKED = cards.MODELS


@pytest.fixture
def without_weights(tmp_path, monkeypatch):
    """An installed package: the cards alone, and an empty cache. The file that a download is kept in."""
    shutil.copytree(PACKED, tmp_path / "models", ignore=shutil.ignore_patterns("*.safetensors"))
    monkeypatch.setattr(cards, "MODELS", tmp_path / "models")
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
        monkeypatch.setattr(cards, "address", lambda name: f"http://127.0.0.1:{server.server_port}/{name}.safetensors")
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
    assert f"downloads the model {NAME} (334,400 bytes) from {cards.address(NAME)} to {without_weights}\n" in said
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


def test_without_a_network_the_error_says_which_file_goes_where(without_weights, monkeypatch, capsys):
    # Nothing listens at port 0.
    monkeypatch.setattr(cards, "address", lambda name: f"http://127.0.0.1:0/{name}.safetensors")
    assert cli.main(["evaluate", f"zoo:{NAME}", "--images", "2", "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert f"http://127.0.0.1:0/{NAME}.safetensors cannot be read: " in said
    assert f"purify_fast/zoo/models/{NAME}/model.safetensors of a clone of the repository to {without_weights}" in said
    without_weights.parent.mkdir(parents=True)
    shutil.copy(PACKED / NAME / "model.safetensors", without_weights)
    assert not zoo.load(NAME).training


def test_a_file_that_the_release_lacks_is_an_error_of_its_address(without_weights, release):
    with pytest.raises(FileNotFoundError, match=rf"{NAME}.safetensors cannot be read: HTTP Error 404"):
        zoo.load(NAME)
    assert release[1][0] == (f"/{NAME}.safetensors", 404)
