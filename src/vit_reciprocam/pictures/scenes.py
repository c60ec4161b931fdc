"""Draw pictures whose objects and masks are known, on which the demo model was trained.

A scene holds one to three objects of different classes over clutter, with masks that are exact.
Everything is drawn from a seed, at any size, so a data set of scenes is a range of integers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from vit_reciprocam.errors import InputError

__all__ = ["CLASSES", "Scene", "draw_scene"]

Points = np.ndarray  # (n, 2), x to the right and y down, in a square from -1 to 1
Shape = tuple[str, Points]  # what picks its colour (body, accent, light, dark), and its corners
Colour = tuple[int, ...]
Pair = tuple[float, float]  # x and y, or half of a width and a height

_SUPERSAMPLE = 2  # drawn larger and scaled down, for smooth edges
_MAX_OBJECTS = 3


@dataclass(frozen=True)
class Scene:
    """A drawn picture and what is in it."""

    image: Image.Image  # RGB, size x size pixels
    labels: tuple[int, ...]  # class index of each object, into `CLASSES`; all differ
    masks: np.ndarray  # visible pixels of each object, (objects, size, size) bool


def draw_scene(seed: int, *, size: int = 112, objects: int | None = None) -> Scene:
    """Draw the scene of a seed; the same seed, size and count give the same pixels.

    The picture is a square of at least 16 pixels per side, with 1 to 3 objects, a number that is
    drawn too if `objects` is None. Other values raise `InputError`.
    """
    if objects is not None and not 1 <= objects <= _MAX_OBJECTS:
        raise InputError(f"objects must be 1 to {_MAX_OBJECTS} or None, got {objects}")
    if size < 16:
        raise InputError(f"size must be at least 16 pixels, got {size}")
    rng = np.random.default_rng(seed)
    count = objects or int(rng.choice([1, 2, 3], p=[0.4, 0.45, 0.15]))
    labels = tuple(int(c) for c in rng.choice(len(CLASSES), size=count, replace=False))
    side = size * _SUPERSAMPLE
    canvas = _background(rng, side)
    masks: list[Image.Image] = []
    for label, (centre, radius) in zip(labels, _places(rng, count), strict=True):
        shapes = _pose(list(CLASSES.values())[label], rng, centre * side, radius * side)
        mask = _paint(canvas, shapes, rng)
        for earlier in masks:
            earlier.paste(0, mask=mask)
        masks.append(mask)
    _scratch(canvas, rng, side)
    image = _add_noise(canvas.resize((size, size), Image.Resampling.BOX), rng)
    small = [np.asarray(m.resize((size, size), Image.Resampling.BOX)) > 128 for m in masks]
    return Scene(image, labels, np.stack(small))


# --- places, poses and the background -------------------------------------------------------------


def _places(rng: np.random.Generator, count: int) -> list[tuple[Points, float]]:
    """Draw the centres and radii of objects that overlap little, as fractions of the side."""
    while True:
        radii = rng.uniform(0.19, {1: 0.36, 2: 0.27, 3: 0.22}[count], size=count)
        centres = [rng.uniform(0.9 * r, 1 - 0.9 * r, size=2) for r in radii]
        apart = all(
            np.linalg.norm(centres[i] - centres[j]) > 0.95 * (radii[i] + radii[j])
            for i in range(count)
            for j in range(i)
        )
        if apart:
            return list(zip(centres, (float(r) for r in radii), strict=True))


def _pose(
    shapes: list[Shape], rng: np.random.Generator, centre: Points, radius: float
) -> list[Shape]:
    """Rotate the shapes, stretch them a little, perhaps mirror them, and move them into place."""
    angle = rng.uniform(-0.5, 0.5)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    stretch = rng.uniform(0.85, 1.15, size=2) * np.array([rng.choice([-1.0, 1.0]), 1.0])
    return [(role, (points * stretch) @ turn.T * radius + centre) for role, points in shapes]


def _background(rng: np.random.Generator, side: int) -> Image.Image:
    """Draw a gradient with clutter: blobs, bars and polygons that belong to no class."""
    ends = rng.integers(0, 256, size=(2, 2, 3)).astype(np.uint8)
    canvas = Image.fromarray(ends).resize((side, side), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(canvas)
    for _ in range(int(rng.integers(8, 26))):
        centre = rng.uniform(0, side, size=2)
        kind = rng.choice(["ellipse", "polygon", "bar"])
        if kind == "ellipse":
            points = _ellipse(0, 0, *rng.uniform(0.02, 0.12, size=2))
        elif kind == "polygon":
            corners = int(rng.integers(3, 7))
            angles = np.sort(rng.uniform(0, 2 * np.pi, size=corners))
            reach = rng.uniform(0.03, 0.13, size=(corners, 1))
            points = np.stack([np.cos(angles), np.sin(angles)], 1) * reach
        else:
            points = _box(0, 0, rng.uniform(0.05, 0.3), rng.uniform(0.005, 0.02))
        _, placed = _pose([("body", points)], rng, centre, side)[0]
        draw.polygon(placed.ravel().tolist(), fill=_colour(rng))
    return canvas.filter(ImageFilter.GaussianBlur(float(rng.uniform(0, 0.012)) * side))


def _scratch(canvas: Image.Image, rng: np.random.Generator, side: int) -> None:
    """Draw a few thin lines over everything, so that an edge alone means nothing."""
    draw = ImageDraw.Draw(canvas)
    for _ in range(int(rng.integers(0, 4))):
        ends = rng.uniform(0, side, size=4)
        draw.line([float(v) for v in ends], fill=_colour(rng), width=max(1, side // 150))


def _add_noise(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    pixels = np.asarray(image, dtype=np.float32)
    noise = rng.normal(0, rng.uniform(0, 9), size=pixels.shape)
    return Image.fromarray((pixels + noise).round().clip(0, 255).astype(np.uint8))


# --- painting an object ---------------------------------------------------------------------------


def _paint(canvas: Image.Image, shapes: list[Shape], rng: np.random.Generator) -> Image.Image:
    """Draw the shapes on the canvas, in order, and return their mask ("L", 0 or 255)."""
    everything = np.vstack([points for _, points in shapes])
    left, top = np.floor(everything.min(0)).clip(0).astype(int)
    right, bottom = np.ceil(everything.max(0)).clip(0, canvas.size).astype(int) + 1
    box = (int(left), int(top), int(right), int(bottom))
    patch = canvas.crop(box)
    body, accent = _colour(rng), _colour(rng)
    fills = {
        "body": _texture(patch.size, canvas.width, body, rng),
        "accent": _texture(patch.size, canvas.width, accent, rng),
        "light": Image.new("RGB", patch.size, (240, 236, 220)),
        "dark": Image.new("RGB", patch.size, (38, 34, 42)),
    }
    outline = tuple(int(c * 0.45) for c in body)
    mask = Image.new("L", patch.size, 0)
    for role, points in shapes:
        corners = (points - (left, top)).ravel().tolist()
        stencil = Image.new("L", patch.size, 0)
        ImageDraw.Draw(stencil).polygon(corners, fill=255)
        patch.paste(fills[role], mask=stencil)
        mask.paste(255, mask=stencil)
        line = ImageDraw.Draw(patch)
        line.line([*corners, *corners[:2]], fill=outline, width=max(1, canvas.width // 160))
    canvas.paste(patch, box)
    whole = Image.new("L", canvas.size, 0)
    whole.paste(mask, box)
    return whole


def _texture(
    size: tuple[int, int], side: int, colour: Colour, rng: np.random.Generator
) -> Image.Image:
    """Draw a plain, shaded, striped, checked or speckled area in one colour, scaled to `side`."""
    y, x = np.mgrid[0 : size[1], 0 : size[0]] / np.float32(side)
    angle, period = rng.uniform(0, np.pi), rng.uniform(0.03, 0.09)
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    kind = rng.choice(["plain", "shaded", "striped", "checked", "speckled"])
    if kind == "plain":
        light = np.ones_like(along)
    elif kind == "shaded":
        light = 0.95 + 0.25 * np.sin(4 * np.pi * along)
    elif kind == "striped":
        light = np.where(along / period % 1 < 0.5, 1.0, 0.72)
    elif kind == "checked":
        light = np.where((along // period + across // period) % 2 < 1, 1.0, 0.72)
    else:
        light = rng.uniform(0.7, 1.2, size=along.shape)
    return Image.fromarray((light[..., None] * np.array(colour)).clip(0, 255).astype(np.uint8))


def _colour(rng: np.random.Generator) -> Colour:
    return tuple(rng.integers(20, 250, size=3).tolist())


# --- the shapes -----------------------------------------------------------------------------------


def _ellipse(
    x: float, y: float, rx: float, ry: float, start: float = 0, stop: float = 360
) -> Points:
    angle = np.radians(np.linspace(start, stop, 28))
    return np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], axis=1)


def _box(x: float, y: float, half_width: float, half_height: float) -> Points:
    corners = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
    return corners * (half_width, half_height) + (x, y)


def _poly(*corners: Pair) -> Points:
    return np.array(corners, dtype=float)


def _band(
    x: float, y: float, outer: Pair, inner: Pair, start: float = 0, stop: float = 360
) -> Points:
    return np.vstack([_ellipse(x, y, *outer, start, stop), _ellipse(x, y, *inner, stop, start)])


_SIDES = (-1, 1)
_PETALS = [(0.52 * np.cos(angle), 0.52 * np.sin(angle)) for angle in np.radians(np.arange(6) * 60)]
_SCALLOPS = [_ellipse(x, 0, 0.245, 0.16, 0, -180) for x in (0.735, 0.245, -0.245, -0.735)]

CLASSES: dict[str, list[Shape]] = {
    "butterfly": [
        ("body", _ellipse(-0.5, -0.4, 0.46, 0.5)),  # four wings
        ("body", _ellipse(-0.5, 0.45, 0.46, 0.38)),
        ("body", _ellipse(0.5, -0.4, 0.46, 0.5)),
        ("body", _ellipse(0.5, 0.45, 0.46, 0.38)),
        *(("accent", _ellipse(s * 0.55, -0.4, 0.18, 0.2)) for s in _SIDES),
        *(("dark", _poly((0, -0.6), (s * 0.3, -1), (s * 0.22, -1), (0, -0.7))) for s in _SIDES),
        ("dark", _ellipse(0, 0, 0.1, 0.72)),
    ],
    "car": [
        ("body", _poly((-0.55, -0.05), (-0.3, -0.5), (0.35, -0.5), (0.6, -0.05))),
        ("light", _poly((-0.35, -0.08), (-0.2, -0.38), (0.27, -0.38), (0.42, -0.08))),  # window
        ("body", _box(0, 0.17, 1, 0.25)),
        *(("dark", _ellipse(s * 0.52, 0.42, 0.24, 0.24)) for s in _SIDES),  # wheels
        *(("light", _ellipse(s * 0.52, 0.42, 0.1, 0.1)) for s in _SIDES),
    ],
    "cup": [
        ("accent", _band(0.5, 0, (0.48, 0.46), (0.28, 0.26), -90, 90)),  # handle
        ("body", _poly((-0.75, -0.75), (0.55, -0.75), (0.42, 0.8), (-0.62, 0.8))),
        ("dark", _ellipse(-0.1, -0.75, 0.65, 0.16)),
    ],
    "fish": [
        ("accent", _poly((0.5, 0), (1, -0.5), (0.88, 0), (1, 0.5))),  # tail
        ("accent", _poly((-0.2, -0.4), (0.15, -0.8), (0.35, -0.3))),  # fin
        ("body", _ellipse(-0.2, 0, 0.8, 0.45)),
        ("light", _ellipse(-0.6, -0.1, 0.15, 0.15)),
        ("dark", _ellipse(-0.62, -0.1, 0.07, 0.07)),
    ],
    "flower": [
        *(("body", _ellipse(x, y, 0.36, 0.36)) for x, y in _PETALS),
        ("accent", _ellipse(0, 0, 0.34, 0.34)),
    ],
    "house": [
        ("body", _box(0, 0.35, 0.7, 0.6)),
        ("accent", _poly((-0.95, -0.2), (0, -1), (0.95, -0.2))),
        ("dark", _box(-0.25, 0.6, 0.17, 0.35)),
        ("light", _box(0.33, 0.25, 0.19, 0.19)),
    ],
    "key": [
        ("body", _band(-0.55, 0, (0.45, 0.45), (0.2, 0.2))),
        ("body", _box(0.42, 0, 0.54, 0.12)),
        *(("body", _box(x, 0.27, 0.08, 0.2)) for x in (0.55, 0.85)),
    ],
    "mushroom": [
        ("light", _poly((-0.25, 0), (0.25, 0), (0.35, 0.95), (-0.35, 0.95))),
        ("body", _ellipse(0, 0.05, 0.95, 0.9, 180, 360)),
        ("light", _ellipse(-0.45, -0.25, 0.13, 0.1)),  # three spots
        ("light", _ellipse(0.05, -0.5, 0.13, 0.1)),
        ("light", _ellipse(0.5, -0.2, 0.13, 0.1)),
    ],
    "rocket": [
        *(("accent", _poly((s * 0.25, 0.3), (s * 0.75, 0.95), (s * 0.2, 0.75))) for s in _SIDES),
        ("light", _poly((-0.18, 0.75), (0.18, 0.75), (0, 1.05))),  # flame
        ("body", np.vstack([_ellipse(0, -0.1, 0.36, 0.9, 180, 360), [(0.3, 0.75), (-0.3, 0.75)]])),
        ("light", _ellipse(0, -0.3, 0.19, 0.19)),
        ("dark", _ellipse(0, -0.3, 0.11, 0.11)),
    ],
    "sailboat": [
        ("dark", _box(0, -0.25, 0.04, 0.75)),
        ("accent", _poly((0.1, -0.95), (0.1, 0.3), (0.8, 0.3))),
        ("light", _poly((-0.1, -0.7), (-0.1, 0.3), (-0.65, 0.3))),
        ("body", _poly((-0.95, 0.45), (0.95, 0.45), (0.6, 0.9), (-0.6, 0.9))),
    ],
    "tree": [
        ("dark", _box(0, 0.75, 0.13, 0.22)),
        ("body", _poly((0, -0.25), (-0.78, 0.6), (0.78, 0.6))),
        ("body", _poly((0, -0.65), (-0.6, 0.15), (0.6, 0.15))),
        ("body", _poly((0, -1.0), (-0.42, -0.3), (0.42, -0.3))),
    ],
    "umbrella": [
        ("dark", _box(0, 0.38, 0.05, 0.42)),
        ("dark", _band(0.16, 0.78, (0.2, 0.2), (0.1, 0.1), 180, 0)),
        ("body", np.vstack([_ellipse(0, 0, 0.98, 0.85, 180, 360), *_SCALLOPS])),
        ("accent", _poly((0, -0.85), (0.245, -0.02), (-0.245, -0.02))),
    ],
}
"""Class name -> the shapes of one object, drawn in this order; a class's index is its place."""
