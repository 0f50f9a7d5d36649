"""People's own folders of images: names, sizes, and files that are no whole images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from richkd.data.datasets import load_dataset
from richkd.data.folders import class_words, list_images, read_class_names, suggest_image_size
from richkd.errors import RichKDError
from richkd.recipe import Images

WORDS = {
    "polar_bear": "polar bear", "PolarBear": "Polar Bear",
    "aquarium-fish": "aquarium fish", "001.Black_footed_Albatross": "Black footed Albatross",
    "n02123045": "tabby", "n99999999": "n99999999", "zebra": "zebra", "Käfer": "Käfer",
    "HTMLPage": "HTML Page", "42": "42", "_": "_",
}  # fmt: skip


@pytest.mark.parametrize(("folder", "words"), WORDS.items())
def test_folder_names_become_words(folder: str, words: str) -> None:
    assert class_words(folder) == words


@pytest.fixture
def own(tmp_path: Path, rng: np.random.Generator) -> Path:
    """Two classes in train and val; train has a cut JPEG, text called .png, and a text file."""
    for part in ("train", "val"):
        for name in ("polar_bear", "seeLöwe"):
            folder = tmp_path / "own" / part / name
            folder.mkdir(parents=True)
            for number in range(3):
                pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.jpg")
    bears = tmp_path / "own" / "train" / "polar_bear"
    (bears / "notes.txt").write_text("ignored, as it is not called an image")
    (bears / "4.png").write_text("no image")
    whole = (bears / "0.jpg").read_bytes()
    (bears / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    return tmp_path / "own"


def test_broken_files_are_refused_or_skipped(own: Path) -> None:
    settings = Images(dataset=f"imagefolder:{own}")
    with pytest.raises(RichKDError, match=r"no image that can be read.*nor 1 more.*--broken skip"):
        load_dataset(settings)
    dataset = load_dataset(Images(dataset=f"imagefolder:{own}", broken="skip"))
    assert {*dataset.skipped} == {"train/polar_bear/4.png", "train/polar_bear/cut.jpg"}
    assert len(dataset.train) == 6 and dataset.class_names == ("polar bear", "see Löwe")
    again = load_dataset(settings, skipped=dataset.skipped)
    assert again.fingerprint == dataset.fingerprint
    for file in (own / "val" / "polar_bear").iterdir():
        file.write_bytes(b"nothing")
    with pytest.raises(RichKDError, match="polar_bear: no image in it can be read"):
        load_dataset(Images(dataset=f"imagefolder:{own}", broken="skip"))


def test_what_is_known_to_be_broken_is_not_decoded_again(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = list_images(own / "train", "skip")
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    again = list_images(own / "train", "refuse", found.skipped)
    assert again.paths == found.paths and (again.sizes == found.sizes).all()


def test_class_names_from_a_file(own: Path, tmp_path: Path) -> None:
    file, folders = tmp_path / "names.txt", ("polar_bear", "seeLöwe")
    file.write_text("ice bear\nsea lion\n", encoding="utf-8")
    assert read_class_names(file, folders) == ("ice bear", "sea lion")
    file.write_text("seeLöwe: sea lion\n", encoding="utf-8")
    assert read_class_names(file, folders) == ("polar bear", "sea lion")
    settings = Images(dataset=f"imagefolder:{own}", class_names=str(file), broken="skip")
    assert load_dataset(settings).class_names == ("polar bear", "sea lion")
    file.write_text("one\n")
    with pytest.raises(RichKDError, match="1 names for 2 classes"):
        read_class_names(file, folders)
    file.write_text("polar_baer: x\n")
    with pytest.raises(RichKDError, match="names 'polar_baer', which is no folder"):
        read_class_names(file, folders)
    with pytest.raises(RichKDError, match="cannot read --class-names"):
        read_class_names(tmp_path / "none.txt", folders)


def test_the_image_size_that_most_images_have() -> None:
    sizes = np.array([[300, 400]] * 3 + [[100, 100]])
    assert suggest_image_size(sizes) == 224
    assert suggest_image_size(np.array([[30, 30]])) == 32
    assert suggest_image_size(np.array([[70, 300], [64, 64]])) == 64
