"""Null baselines: maps that explain nothing, from pictures and a patch grid alone, without torch.

They show what a metric gives to a map that does not look at the model, or not even at the picture.
Each is f(images, grid, **settings) -> (B, h, w), from preprocessed images (B, ch, H, W) and a
model's grid (h, w): its own values in at least float32, before each map is scaled to [0, 1].
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from vit_reciprocam.core.maps import Size, cubic_weights, min_max
from vit_reciprocam.errors import InputError, check_choice

__all__ = [
    "NULLS",
    "NullBaseline",
    "center",
    "check_keywords",
    "image_edges",
    "null_maps",
    "random",
    "uniform",
]

_LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601


def random(images: np.ndarray, grid: Size, *, seed: int = 0, cells: int = 4) -> np.ndarray:
    """Return smooth noise, drawn anew for each picture.

    Uniform noise on `cells` x `cells` is upsampled bicubically, with its corner cells on the grid's
    corner patches. It is drawn from the seed and the picture's bytes, so it is the same in every
    run and batch, but changes if parts of the picture are masked: a map that stayed the same would
    count as coherent in ADCC.

    Args:
        images: Images (B, ch, H, W), from whose bytes the noise is seeded.
        grid: Patch grid (h, w).
        seed: Seed of the noise, beside the images.
        cells: Number of cells along each side, before the noise is upsampled.

    Raises:
        InputError: If a setting does not fit.
    """
    if not isinstance(cells, int) or cells < 2:
        raise InputError(f"cells must be at least 2, a whole number; got {cells}")
    noise = np.stack([_noise(image, seed, cells) for image in _as_dtype_of(images, images)])
    rows, columns = (_bicubic_weights(side, cells) for side in grid)
    return _as_dtype_of(images, rows @ noise @ columns.T)


def center(images: np.ndarray, grid: Size, *, sigma: float = 0.5) -> np.ndarray:
    """Return a Gaussian blob in the middle of every picture.

    Args:
        images: Images (B, ch, H, W), of which only the number matters.
        grid: Patch grid (h, w).
        sigma: Standard deviation, in halves of the picture's height and width.

    Raises:
        InputError: If sigma is not positive.
    """
    if not isinstance(sigma, (int, float)) or not sigma > 0:
        raise InputError(f"sigma must be positive; got {sigma}")
    y, x = ((2 * np.arange(side) + 1) / side - 1 for side in grid)
    blob = np.exp(-(y[:, None] ** 2 + x**2) / (2 * sigma**2))
    return _as_dtype_of(images, np.repeat(blob[None], len(images), axis=0))


def uniform(images: np.ndarray, grid: Size) -> np.ndarray:
    """Return 1 everywhere."""
    return _as_dtype_of(images, np.ones((len(images), *grid)))


def image_edges(images: np.ndarray, grid: Size) -> np.ndarray:
    """Return how strong the edges in each patch are, whatever the model.

    A patch's value is the mean length of the Sobel gradient over its pixels. The gradient is that
    of the preprocessed picture's luminance (ITU-R BT.601), or of the mean of its channels if they
    are not three. If the grid does not divide the picture, patches share the pixels on their
    borders, as in adaptive average pooling.
    """
    images, channels = _as_dtype_of(images, images), images.shape[1]
    weights = _LUMINANCE if channels == 3 else [1 / channels] * channels
    luminance = np.tensordot(np.asarray(weights, images.dtype), images, axes=(0, 1))
    around = np.pad(luminance, ((0, 0), (1, 1), (1, 1)), mode="edge")
    across = _smooth_rows(around[:, :, 2:] - around[:, :, :-2])
    down = _smooth_rows((around[:, 2:] - around[:, :-2]).swapaxes(1, 2)).swapaxes(1, 2)
    rows, columns = (
        _pooling_weights(side, n) for side, n in zip(grid, images.shape[2:], strict=True)
    )
    return _as_dtype_of(images, rows @ np.hypot(across, down) @ columns.T)


class NullBaseline(NamedTuple):
    """A null baseline, which explains nothing and shows what a metric gives for that."""

    draw: Callable[..., np.ndarray]  # from images and a grid to its maps
    clause: str  # for a sentence such as "random, which is drawn at random, has …"


NULLS: Mapping[str, NullBaseline] = MappingProxyType(
    {
        "random": NullBaseline(random, "which is drawn at random"),
        "center": NullBaseline(center, "which never looks at the picture"),
        "uniform": NullBaseline(uniform, "which marks everything alike"),
        "image_edges": NullBaseline(image_edges, "which never looks at the model"),
    }
)
"""Every null baseline by its name in `METHODS`."""


def null_maps(name: str, images: np.ndarray, grid: Size, **settings: Any) -> np.ndarray:
    """Return the maps (B, h, w) of a null baseline in [0, 1], as `METHODS` scales them."""
    values = NULLS[name].draw(images, grid, **settings).astype(np.float32, copy=False)
    return values if name == "uniform" else min_max(values)[0]  # uniform stays at 1


def check_keywords(name: str, function: Callable[..., Any], settings: Mapping[str, Any]) -> None:
    """Refuse settings for which a method's function has no keyword, and list those it has."""
    parameters = inspect.signature(function).parameters.values()
    known = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    for setting in settings:
        if not known:
            raise InputError(f"method {name} has no settings; got {setting!r}")
        check_choice(f"a setting of {name}", setting, known)


def _noise(image: np.ndarray, seed: int, cells: int) -> np.ndarray:
    """Return noise (cells, cells) that depends on the seed and the picture's bytes alone."""
    digest = hashlib.blake2b(f"{seed} ".encode() + image.tobytes(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "big")).random((cells, cells))


def _bicubic_weights(side: int, cells: int) -> np.ndarray:
    """Return bicubic weights (side, cells), with the outer cells centred on the outer places."""
    place = np.linspace(0, cells - 1, side)[:, None]
    beyond = np.arange(-2, cells + 2)  # the cells at the border are repeated
    weights = cubic_weights(abs(place - beyond))
    return np.asarray(weights @ (beyond.clip(0, cells - 1)[:, None] == np.arange(cells)))


def _smooth_rows(differences: np.ndarray) -> np.ndarray:
    """Return differences (B, H + 2, W) weighted 1, 2, 1 down the rows, as a gradient per pixel."""
    weighted = differences[:, :-2] + 2 * differences[:, 1:-1] + differences[:, 2:]
    return np.asarray(weighted) / 8  # the weights sum to 4, and a difference spans two pixels


def _pooling_weights(side: int, pixels: int) -> np.ndarray:
    """Return weights (side, pixels) that average all pixels which a patch touches."""
    first, pixel = np.arange(side)[:, None] * pixels, np.arange(pixels) * side
    touched = (pixel + side > first) & (pixel < first + pixels)
    return np.asarray(touched / touched.sum(axis=1, keepdims=True))


def _as_dtype_of(images: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return values in the images' dtype, or in float32 if that is narrower."""
    return values.astype(np.result_type(images.dtype, np.float32), copy=False)
