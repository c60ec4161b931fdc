"""Read pictures from files, folders and globs, PIL images and arrays."""

from __future__ import annotations

import glob
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vit_reciprocam.errors import ImageError

__all__ = ["ImageSource", "find_images", "read_image"]

ImageSource = str | Path | Image.Image | np.ndarray
"""A file, a PIL image, or a uint8 array, RGB (H, W, 3) or grey (H, W)."""

_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def find_images(
    paths: Iterable[str | Path], *, skip: Callable[[Path], bool] = lambda folder: False
) -> list[Path]:
    """Return the picture files that files, folders and globs name, each file once.

    Folders are searched with all their subfolders, in the order of names. A path that does not
    exist is kept, so that `read_image` refuses it. Pictures of a folder for which `skip` is true
    are left out: `results.files.holds_results` skips saved explanations. A folder or glob without
    a picture raises `ImageError`.
    """
    found: dict[Path, None] = {}
    for given in paths:
        path = Path(given)
        if path.is_dir():
            files = [p for p in sorted(path.rglob("*")) if p.suffix.lower() in _SUFFIXES]
            results = {folder for folder in {p.parent for p in files} if skip(folder)}
            files = [p for p in files if p.is_file() and p.parent not in results]
            if not files:
                raise ImageError(f"no pictures in folder {path} ({', '.join(sorted(_SUFFIXES))})")
        elif glob.has_magic(str(given)) and not path.exists():
            names = glob.iglob(str(given), recursive=True)  # noqa: PTH207, Path.glob takes no absolute pattern
            matches = sorted(Path(name) for name in names)
            files = [p for p in matches if p.is_file()]
            if not files:
                raise ImageError(f"no file matches {given}")
        else:
            files = [path]
        found.update(dict.fromkeys(files))
    return list(found)


def read_image(source: ImageSource) -> Image.Image:
    """Return an upright RGB picture with 8 bits per channel.

    The EXIF rotation is applied, transparency is laid on white, 16-bit grey is scaled to 8 bits,
    and the first frame of an animation is taken.

    Raises:
        ImageError: If it is not a picture, is damaged, or has more than
            `PIL.Image.MAX_IMAGE_PIXELS` pixels.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        return _decode(source, "the picture")
    if not isinstance(source, (str, Path)):
        raise ImageError(
            "an image must be a file name, a PIL image or a uint8 array (H, W, 3), "
            f"got {type(source).__name__}"
        )
    path = Path(source)
    if path.is_dir():
        raise ImageError(
            f"{path} is a folder: folders and globs are for the command line, pass a list of "
            f"files, such as sorted(Path({str(path)!r}).glob('*.jpg'))"
        )
    if not path.exists():
        hint = ": globs are for the command line, pass a list of files"
        raise ImageError(f"no such file: {path}{hint if glob.has_magic(str(path)) else ''}")
    if path.is_file() and path.stat().st_size == 0:
        raise ImageError(f"{path} is empty (0 bytes)")
    return _decode(path, str(path))


def _decode(source: Path | Image.Image, name: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if isinstance(source, Image.Image):
                return _to_rgb(source, name)
            with Image.open(source) as image:
                return _to_rgb(image, name)
    except ImageError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ImageError(
            f"{name} is too large to decode safely: more than {Image.MAX_IMAGE_PIXELS} pixels. If "
            "you trust it, raise the limit: PIL.Image.MAX_IMAGE_PIXELS in Python, --max-pixels on "
            "the command line"
        ) from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{name} is not a picture in a format that Pillow can read") from error
    except Exception as error:  # Pillow's decoders raise errors of many kinds on damaged data
        raise ImageError(f"{name} is damaged or cannot be read: {error}") from error


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim < 2 or array.shape[2:] not in ((), (3,)):
        raise ImageError(
            "an image array must be uint8 of shape (H, W, 3) or (H, W), "
            f"got {array.dtype} of shape {array.shape}"
        )
    if 0 in array.shape:
        raise ImageError(f"an image array must not be empty, got shape {array.shape}")
    return Image.fromarray(array).convert("RGB")


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if 0 in image.size:
        raise ImageError(f"{name} has no pixels: {image.width}x{image.height}")
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey, which convert("RGB") would clip to white
        values = np.asarray(image).astype(np.float64)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(f"{name} has grey values outside 0 to 65535; scale it to 8 or 16 bits")
        return Image.fromarray((values / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ImageError(
            f"{name} has floating-point pixels, which do not say where white is; save it as 8-bit"
        )
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")
