import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from vit_reciprocam.errors import ImageError
from vit_reciprocam.pictures.read import find_images, read_image
from vit_reciprocam.results.files import holds_results


def photo(width=60, height=40, seed=0):
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tiff", ".webp", ".jpg"])
def test_formats(tmp_path, suffix):
    path = tmp_path / f"photo{suffix}"
    photo().save(path, **({"lossless": True} if suffix == ".webp" else {}))
    image = read_image(path)
    assert image.mode == "RGB"
    tolerance = 40 if suffix == ".jpg" else 0
    difference = np.abs(np.asarray(image).astype(int) - np.asarray(photo())).max()
    assert difference <= tolerance


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    values = np.array([[0, 257 * 100, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    assert np.asarray(read_image(tmp_path / "deep.png"))[0, :, 0].tolist() == [0, 100, 255]


def test_cmyk(tmp_path):
    photo().convert("CMYK").save(tmp_path / "print.jpg", quality=95)
    difference = np.asarray(read_image(tmp_path / "print.jpg")).astype(int) - np.asarray(photo())
    assert np.abs(difference).mean() < 8


def test_palette(tmp_path):
    image = photo().quantize(32)
    image.save(tmp_path / "palette.png")
    assert np.array_equal(read_image(tmp_path / "palette.png"), image.convert("RGB"))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_lies_on_white(tmp_path, mode):
    image = Image.new(mode, (2, 1), (10,) * (len(mode) - 1) + (255,))
    image.putpixel((1, 0), (10,) * (len(mode) - 1) + (0,))
    image.save(tmp_path / "clear.png")
    assert np.asarray(read_image(tmp_path / "clear.png"))[0].tolist() == [[10] * 3, [255] * 3]


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate a quarter clockwise
    photo().save(tmp_path / "turned.png", exif=exif)
    assert read_image(tmp_path / "turned.png").size == (40, 60)
    assert np.array_equal(read_image(tmp_path / "turned.png"), photo().rotate(-90, expand=True))


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "moving.gif").getpixel((3, 3)) == (255, 0, 0)


def test_pil_images_and_arrays_need_no_file():
    assert np.array_equal(read_image(photo().convert("L")), photo().convert("L").convert("RGB"))
    assert np.array_equal(read_image(np.asarray(photo())), photo())
    assert read_image(np.zeros((4, 5), np.uint8)).size == (5, 4)


@pytest.mark.parametrize(
    "array", [np.zeros((4, 5, 3)), np.zeros((3, 4, 5), np.uint8), np.zeros((0, 5, 3), np.uint8)]
)
def test_arrays_that_are_no_pictures(array):
    with pytest.raises(ImageError, match=r"array must"):
        read_image(array)


def test_not_a_picture(tmp_path):
    (tmp_path / "notes.jpg").write_text("hello")
    with pytest.raises(ImageError, match=r"notes\.jpg is not a picture in a format"):
        read_image(tmp_path / "notes.jpg")


def test_truncated(tmp_path):
    photo(200, 200).save(tmp_path / "whole.jpg")
    content = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(content[: len(content) // 2])
    with pytest.raises(ImageError, match=r"half\.jpg is damaged.*truncated"):
        read_image(tmp_path / "half.jpg")


def test_zero_bytes_and_missing(tmp_path):
    (tmp_path / "empty.png").touch()
    with pytest.raises(ImageError, match=r"empty\.png is empty \(0 bytes\)"):
        read_image(tmp_path / "empty.png")
    with pytest.raises(ImageError, match=r"no such file: .*none\.png"):
        read_image(tmp_path / "none.png")


def test_a_folder_is_no_picture(tmp_path):
    with pytest.raises(ImageError, match=r"is a folder: .*pass a list of files"):
        read_image(tmp_path)


def test_damaged_pil_images_are_refused_like_files(tmp_path):
    photo(200, 200).save(tmp_path / "whole.jpg")
    content = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(content[: len(content) // 2])
    with Image.open(tmp_path / "half.jpg") as image, pytest.raises(ImageError, match="damaged"):
        read_image(image)
    with pytest.raises(ImageError, match="no pixels: 0x10"):
        read_image(Image.new("RGB", (0, 10)))


@pytest.mark.parametrize("thing", [None, 3, b"bytes"])
def test_things_that_are_no_pictures(thing):
    with pytest.raises(ImageError, match="must be a file name, a PIL image or a uint8 array"):
        read_image(thing)


@pytest.mark.needs_extras
def test_a_tensor_is_no_picture():
    import torch

    with pytest.raises(ImageError, match="must be a file name, a PIL image or a uint8 array"):
        read_image(torch.zeros(3, 4, 4))


@pytest.mark.parametrize("form", ["PNG", "TIFF", "GIF", "BMP", "WEBP", "JPEG"])
def test_any_damage_is_an_image_error_or_none(form, tmp_path):
    """Bytes of a small file broken in turn: it is read or refused, and nothing else."""
    buffer = io.BytesIO()
    photo(6, 5).save(buffer, format=form)
    content = buffer.getvalue()
    path = tmp_path / "broken"
    for place in range(0, len(content), 2):
        broken = bytes([content[place] ^ 0xFF])
        path.write_bytes(content[:place] + broken + content[place + 1 :])
        with contextlib.suppress(ImageError):
            assert read_image(path).mode == "RGB"


def test_floating_point_pixels(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(ImageError, match="floating-point pixels"):
        read_image(tmp_path / "float.tiff")


def bomb(path, side):
    """A PNG that claims side × side pixels and holds none of them."""

    def chunk(kind, data):
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b""))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b""))


@pytest.mark.parametrize("side", [10_000, 60_000])
def test_decompression_bomb_is_refused_with_the_limit(tmp_path, side):
    bomb(tmp_path / "bomb.png", side)
    with pytest.raises(
        ImageError, match=r"more than 89478485 pixels.*MAX_IMAGE_PIXELS.*--max-pixels"
    ):
        read_image(tmp_path / "bomb.png")


def test_the_limit_is_adjustable(tmp_path, monkeypatch):
    photo(20, 20).save(tmp_path / "small.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    with pytest.raises(ImageError, match="more than 300 pixels"):
        read_image(tmp_path / "small.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    assert read_image(tmp_path / "small.png").size == (20, 20)


def test_find_images_in_folders_and_globs(tmp_path):
    for name in ("b.jpg", "a.PNG", "notes.txt", "deep/c.webp", "saved/grid.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "saved" / "manifest.json").write_text('{"generator": "vit-reciprocam"}')
    (tmp_path / "folder.png").mkdir()
    names = [str(p.relative_to(tmp_path)) for p in find_images([tmp_path], skip=holds_results)]
    assert names == ["a.PNG", "b.jpg", "deep/c.webp"]
    assert find_images([f"{tmp_path}/*.jpg", tmp_path / "b.jpg"]) == [tmp_path / "b.jpg"]
    assert find_images([tmp_path / "none.jpg"]) == [tmp_path / "none.jpg"]
    with pytest.raises(ImageError, match="no file matches"):
        find_images([f"{tmp_path}/*.gif"])
    (tmp_path / "bare").mkdir()
    with pytest.raises(ImageError, match="no pictures in folder"):
        find_images([tmp_path / "bare"])
