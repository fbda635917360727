"""`purify-fast purify` writes what the saved defence makes of image files."""

import numpy as np
import pytest
import torch
from denoisers import trained_unet
from PIL import Image

import purify_fast
from purify_fast import zoo
from purify_fast.data import to_float
from purify_fast.methods.diffusion import save_denoiser

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def digits(tmp_path):
    """Five digits, uint8 ``[5, 1, 16, 16]``, which are also files in the folder ``in`` and a folder inside it."""
    images = purify_fast.load_dataset("digits").x_test[:5]
    (tmp_path / "in/deep").mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image[0].numpy()).save(tmp_path / ("in/deep" if i > 2 else "in") / f"{i}.png")
    return images


def expected(model, images, seed=0):
    with torch.no_grad(), model.fixed_noise(seed):
        return (model.purify(to_float(images))[:, 0].clamp(0, 1) * 255).round().byte().numpy()


@pytest.mark.parametrize("name", ["digits-carso-pipeline", "digits-atop-pipeline", "digits-diffpure"])
def test_a_file_is_purified_by_a_model_of_the_zoo(name, digits, tmp_path, run):
    model = zoo.load(name)
    code, said = run("purify", f"zoo:{name}", tmp_path / "in/1.png", tmp_path / "out.png", "--seed", 3)
    assert code == 0 and said.startswith(f"written: {tmp_path / 'out.png'} (1 image")
    several = f"the first of {model.samples} purified images"
    assert (several in said) is (model.samples > 1)
    written = np.asarray(Image.open(tmp_path / "out.png"))
    assert written.shape == (16, 16) and (written == expected(model, digits[1:2], 3)[0, 0]).all()
    assert (written != digits[1, 0].numpy()).any()


def test_a_folder_is_purified_with_its_subfolders_whatever_the_batches(digits, tmp_path, run):
    (tmp_path / "in/.hidden").mkdir()
    Image.fromarray(digits[0, 0].numpy()).save(tmp_path / "in/.hidden/0.png")
    words = ["purify", "zoo:digits-carso-pipeline", tmp_path / "in"]
    assert run(*words, tmp_path / "out", "--batch-size", 2)[0] == 0
    assert run(*words, tmp_path / "other", "--batch-size", 5)[0] == 0
    wanted = expected(zoo.load("digits-carso-pipeline"), digits)
    for place in ("out", "other"):
        written = sorted(path for path in (tmp_path / place).rglob("*") if path.is_file())
        names = [path.relative_to(tmp_path / place).as_posix() for path in written]
        assert names == ["0.png", "1.png", "2.png", "deep/3.png", "deep/4.png"]
        pictures = np.stack([np.asarray(Image.open(path)) for path in written])
        # the sizes of the batches may change the last bit of a product
        assert abs(pictures - wanted[:, 0].astype(int)).max() <= 1


def test_a_saved_folder_with_colors_and_a_denoiser_without_a_classifier(tmp_path, run):
    save_denoiser(trained_unet(3, 8), tmp_path / "denoiser", (3, 12, 8), {"schedule": "linear", "prediction": "v"})
    levels = np.random.RandomState(0).randint(0, 256, (12, 8, 3)).astype(np.uint8)
    Image.fromarray(levels).save(tmp_path / "in.png")
    words = ["purify", tmp_path / "denoiser", tmp_path / "in.png", tmp_path / "out.png", "--t-star", 0.2]
    assert run(*words, "--denoising-steps", 3)[0] == 0
    loaded = purify_fast.load_defence(tmp_path / "denoiser", torch.nn.Flatten(), process={"t_star": 0.2, "steps": 3})
    wanted = expected(loaded, torch.from_numpy(levels.transpose(2, 0, 1))[None])[0]
    assert (np.asarray(Image.open(tmp_path / "out.png")).transpose(2, 0, 1) == wanted).all()
    # a gray image is read as three equal channels
    Image.fromarray(levels[..., 0]).save(tmp_path / "in.png")
    assert run(*words, "--denoising-steps", 3)[0] == 0
    gray = torch.from_numpy(levels[..., 0]).expand(1, 3, 12, 8)
    wanted = expected(loaded, gray)[0]
    assert (np.asarray(Image.open(tmp_path / "out.png")).transpose(2, 0, 1) == wanted).all()


def test_unusable_input_is_refused(digits, tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    colors = np.zeros((16, 16, 3), np.uint8)
    colors[0, 0, 0] = 255
    Image.fromarray(colors).save("colors.png")
    (tmp_path / "in/broken.png").write_bytes(b"not an image")
    (tmp_path / "twice").mkdir()
    for suffix in ("png", "jpg"):
        Image.fromarray(digits[0, 0].numpy()).save(f"twice/a.{suffix}")
    carso = "zoo:digits-carso-pipeline"
    for words, message in {
        (carso, "colors.png", "o.png"): "colors.png must be 1x16x16 (channels x height x width)",
        (carso, "in", "o"): "the image cannot be decoded: in/broken.png: ",
        (carso, "in/0.png", "o.jpg"): "TARGET must be a .png file, because SOURCE is a file, got o.jpg",
        (carso, "in/0.png", "in/0.png"): "each image needs its own file in TARGET, apart from SOURCE, got in/0.png",
        (carso, "twice", "o"): "each image needs its own file in TARGET, apart from SOURCE, got o",
        (carso, "nowhere", "o"): "SOURCE must be an image, or a folder of images, got nowhere",
        (carso, "in/0.png", "o.png", "--t-star", "0.1"): "process must be None",
        ("zoo:digits-pgd-at", "in/0.png", "o.png"): "name must be a defence of the zoo",
        ("nowhere", "in/0.png", "o.png"): "nowhere/model.safetensors is missing",
    }.items():
        code, said = run("purify", *words)
        assert code == 2 and message in said, (words, said)
