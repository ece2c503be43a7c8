"""Image files as they come: transparent, turned by EXIF, gray of many bits, hidden, linked, listed without a label."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from efficientai_toolkit.errors import DataError
from efficientai_toolkit.tasks import image_folder, images, mini_imagenet
from efficientai_toolkit.tasks.image_folder import ImageFolder
from efficientai_toolkit.tasks.images import decode
from efficientai_toolkit.tasks.mini_imagenet import MiniImageNet
from efficientai_toolkit.tasks.storage import cached

_ORIENTATION = 0x0112


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def gray(data: bytes, size: tuple[int, int] = (20, 20)) -> np.ndarray:
    return decode(data, "x.png", size, "L")[..., 0]


def stroke(mode: str) -> Image.Image:
    """A black stroke, half of it half transparent, on nothing, whose colour is black too."""
    alpha = np.zeros((20, 20), np.uint8)
    alpha[5:10, 8:12], alpha[10:15, 8:12] = 255, 128
    image = Image.new("RGBA", (20, 20))
    image.putalpha(Image.fromarray(alpha))
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_is_white(mode):
    expected = np.full((20, 20), 255)
    expected[5:10, 8:12], expected[10:15, 8:12] = 0, 127
    for channels, wanted in ((1, "L"), (3, "RGB")):
        found = decode(encoded(stroke(mode)), "x.png", (20, 20), wanted)
        np.testing.assert_array_equal(found, np.repeat(expected[..., None], channels, axis=2))


@pytest.mark.parametrize(("kind", "mode"), [("PNG", "P"), ("PNG", "L"), ("PNG", "RGB"), ("GIF", "P"), ("GIF", "L")])
def test_a_colour_that_means_transparent_is_white(kind, mode):
    plain = np.full((20, 20), 70, np.uint8)
    plain[5:15, 8:12] = 10
    image = Image.fromarray(plain)
    if mode == "P":
        image.putpalette([value for value in range(256) for _ in "RGB"])
    data = encoded(image.convert(mode), kind, transparency=(70, 70, 70) if mode == "RGB" else 70)
    np.testing.assert_array_equal(gray(data), np.where(plain == 70, 255, 10))


def test_an_opaque_image_with_alpha_is_as_it_was():
    pixels = np.arange(400, dtype=np.uint8).reshape(20, 20)
    image = Image.fromarray(pixels).convert("RGBA")
    np.testing.assert_array_equal(gray(encoded(image)), pixels)


@pytest.mark.parametrize(("kind", "exact"), [("PNG", True), ("TIFF", True), ("JPEG", False)])
@pytest.mark.parametrize(
    ("orientation", "shown"),
    [
        (1, lambda a: a),
        (2, np.fliplr),
        (3, lambda a: np.rot90(a, 2)),
        (4, np.flipud),
        (5, np.transpose),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: np.rot90(a, 2).T),
        (8, np.rot90),
        (9, lambda a: a),
    ],
)
def test_an_image_is_upright_as_exif_says(orientation, shown, kind, exact):
    pixels = np.zeros((16, 32), np.uint8)
    pixels[:8, :16], pixels[8:, :16], pixels[:8, 16:] = 240, 160, 80
    exif = Image.Exif()
    exif[_ORIENTATION] = orientation
    data, expected = encoded(Image.fromarray(pixels), kind, exif=exif), shown(pixels)
    np.testing.assert_allclose(gray(data, expected.shape), expected, atol=0 if exact else 3)


def test_deep_gray_is_turned_too():
    pixels = (np.arange(512, dtype=np.uint16) * 128).reshape(16, 32)
    exif = Image.Exif()
    exif[_ORIENTATION] = 6
    found = gray(encoded(Image.fromarray(pixels), exif=exif), (32, 16))
    np.testing.assert_allclose(found, np.rot90(pixels, -1) / 257, atol=0.5)


@pytest.mark.parametrize("exif", [b"Exif\0\0MM", b"Exif\0\0junk junk", b"Exif\0\0MM\0*\0\0\0\x08\xff", b"E"])
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_exif_that_cannot_be_read_says_nothing(kind, exif):
    data = encoded(
        Image.new("RGB", (20, 20), (9, 9, 9)), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {})
    )
    assert (gray(data) == 9).all()


def test_an_exif_entry_that_cannot_be_written_again_keeps_no_image_from_being_read():
    exif = Image.Exif()
    exif[_ORIENTATION], exif[0x011A] = 3, 72.0  # XResolution, made a text below
    block = exif.tobytes().replace(b"\x01\x1a\x00\x05", b"\x01\x1a\x00\x07")
    pixels = np.arange(400, dtype=np.uint8).reshape(20, 20)
    np.testing.assert_array_equal(gray(encoded(Image.fromarray(pixels), exif=block)), np.rot90(pixels, 2))


def test_gray_of_32_bits_may_have_the_scale_of_8():
    pixels = (np.arange(400) % 256).astype(np.int32).reshape(20, 20)
    np.testing.assert_array_equal(gray(encoded(Image.fromarray(pixels), "TIFF")), pixels)
    dark = (np.arange(400) % 256).astype(np.uint16).reshape(20, 20)  # of 16 bits, dark is dark
    assert gray(encoded(Image.fromarray(dark), "TIFF")).max() == 1


@pytest.mark.parametrize(
    ("pixels", "sentence"),
    [
        (np.linspace(0, 1, 400, dtype=np.float32), "x.png holds gray as floating-point numbers, .*8 or 16 bits a pix"),
        (np.arange(-5, 395, dtype=np.int32), "x.png holds gray values from -5 to 394; expected 0 to 255 or 0 to 65535"),
        (np.arange(400, dtype=np.int32) * 1000, "x.png holds gray values from 0 to 399000; expected 0 to 255 or"),
    ],
)
def test_gray_without_a_scale_is_refused(pixels, sentence):
    with pytest.raises(DataError, match=f"^{sentence}"):
        gray(encoded(Image.fromarray(pixels.reshape(20, 20)), "TIFF"))


def put(path: Path, value: int = 50) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), value).save(path)


@pytest.mark.parametrize("splits", [("",), ("train", "val", "test")])
def test_hidden_folders_and_files_are_no_classes_and_no_images(tmp_path, splits):
    for split in splits:
        for name in ("a", "b", ".thumbnails"):
            put(tmp_path / split / f"{name}{split}" / "0.png")
        (tmp_path / split / f"a{split}" / "._0.png").write_bytes(b"what a Mac leaves on other file systems")
    data = ImageFolder(tmp_path).read(8, "L")
    assert [name.rpartition("/")[2] for name in data.names] == [f"{name}{split}" for split in splits for name in "ab"]
    assert len(data.images) == 2 * len(splits)


def test_a_link_to_nothing_is_named(tmp_path):
    put(tmp_path / "a" / "0.png")
    (tmp_path / "a" / "1.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(DataError, match=r"cannot read .*a/1\.png: No such file .*\(it is a link to .*gone\.png\)"):
        ImageFolder(tmp_path).read(8, "L")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(DataError, match=r"cannot read .*loop: .*\(it is a link to .*loop\)"):
        cached("x", [tmp_path / "loop"], dict)


def table(folder: Path, rows: list[list[str]]) -> Path:
    put(folder / "images" / "0.jpg")
    with (folder / "train.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["filename", "label"], *rows])
    return folder.parent


@pytest.mark.parametrize("row", [["0.jpg"], ["0.jpg", ""], ["0.jpg", " "]])
def test_a_row_without_a_label_is_named(tmp_path, row):
    root = table(tmp_path / "mini-imagenet", [["0.jpg", "a"], [], ["0.jpg", 'b "two\nlines"'], row])
    with pytest.raises(DataError, match=r"train\.csv, line 6: the label is missing"):
        MiniImageNet(root).read()


def test_what_an_older_decoder_left_in_the_cache_is_decoded_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    put(tmp_path / "data" / "a" / "0.png")
    root = table(tmp_path / "mini-imagenet", [["0.jpg", "a"]])

    def pixels():
        return ImageFolder(tmp_path / "data").read(8, "L").images, mini_imagenet._read_split(
            root / "mini-imagenet", "train"
        )["images"]

    with monkeypatch.context() as older:
        for module in (image_folder, mini_imagenet):
            older.setattr(module, "DECODER", images.DECODER - 1)
            older.setattr(module, "decode", lambda _, __, size, mode: np.zeros((*size, len(mode)), np.uint8))
        assert not any(each.any() for each in pixels())
    assert all(each.all() for each in pixels())
