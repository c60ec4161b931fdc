"""Draw pictures whose objects and masks are known, on which the demo model was trained.

A scene holds one to three objects of different classes over clutter, with masks that are exact.
Everything is drawn from a seed, at any size, so a data set of scenes is a range of integers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from vit_reciprocam.errors import InputError

__all__ = ["CLASSES", "Scene", "draw_scene"]

Points = np.ndarray  # (n, 2), x to the right and y down, in a square from -1 to 1
Shape = tuple[
    str, Points
]  # the role that picks its colour (body, accent, light, dark); its corners
Colour = tuple[int, int, int]

_SUPERSAMPLE = 2  # drawn larger and scaled down, for smooth edges
_MAX_OBJECTS = 3


@dataclass(frozen=True)
class Scene:
    """A drawn picture and what is in it.

    Attributes:
        image: The picture, RGB, size x size pixels.
        labels: Class index of each object, into `CLASSES`; all differ.
        masks: Visible pixels of each object, (objects, size, size) bool.
    """

    image: Image.Image
    labels: tuple[int, ...]
    masks: np.ndarray


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
        shapes = _pose(list(CLASSES.values())[label](), rng, centre * side, radius * side)
        mask = _paint(canvas, shapes, rng)
        masks = [_subtract(earlier, mask) for earlier in masks] + [mask]
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
        role = [("body", points)]
        _, placed = _pose(role, rng, centre, side)[0]
        draw.polygon(_flat(placed), fill=_colour(rng))
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
        corners = _flat(points - (left, top))
        stencil = Image.new("L", patch.size, 0)
        ImageDraw.Draw(stencil).polygon(corners, fill=255)
        patch.paste(fills[role], mask=stencil)
        mask.paste(255, mask=stencil)
        line = ImageDraw.Draw(patch)
        line.line([*corners, corners[0]], fill=outline, width=max(1, canvas.width // 160))
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
    r, g, b = rng.integers(20, 250, size=3)
    return int(r), int(g), int(b)


def _subtract(mask: Image.Image, cover: Image.Image) -> Image.Image:
    left = mask.copy()
    left.paste(0, mask=cover)
    return left


def _flat(points: Points) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in points]


# --- the shapes -----------------------------------------------------------------------------------


def _ellipse(
    x: float, y: float, rx: float, ry: float, start: float = 0, stop: float = 360
) -> Points:
    angle = np.radians(np.linspace(start, stop, 28))
    return np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], axis=1)


def _box(x: float, y: float, half_width: float, half_height: float) -> Points:
    return _poly(
        (x - half_width, y - half_height),
        (x + half_width, y - half_height),
        (x + half_width, y + half_height),
        (x - half_width, y + half_height),
    )


def _poly(*corners: tuple[float, float]) -> Points:
    return np.array(corners, dtype=float)


def _butterfly() -> list[Shape]:
    wings = [_ellipse(s * 0.5, y, 0.46, r) for s in (-1, 1) for y, r in ((-0.4, 0.5), (0.45, 0.38))]
    spots = [_ellipse(s * 0.55, -0.4, 0.18, 0.2) for s in (-1, 1)]
    feelers = [_poly((0, -0.6), (s * 0.3, -1), (s * 0.22, -1), (0, -0.7)) for s in (-1, 1)]
    return (
        [("body", wing) for wing in wings]
        + [("accent", spot) for spot in spots]
        + [("dark", feeler) for feeler in feelers]
        + [("dark", _ellipse(0, 0, 0.1, 0.72))]
    )


def _car() -> list[Shape]:
    cabin = _poly((-0.55, -0.05), (-0.3, -0.5), (0.35, -0.5), (0.6, -0.05))
    window = _poly((-0.35, -0.08), (-0.2, -0.38), (0.27, -0.38), (0.42, -0.08))
    wheels = [_ellipse(s * 0.52, 0.42, 0.24, 0.24) for s in (-1, 1)]
    hubs = [_ellipse(s * 0.52, 0.42, 0.1, 0.1) for s in (-1, 1)]
    return (
        [("body", cabin), ("light", window), ("body", _box(0, 0.17, 1, 0.25))]
        + [("dark", wheel) for wheel in wheels]
        + [("light", hub) for hub in hubs]
    )


def _cup() -> list[Shape]:
    ring = np.vstack([_ellipse(0.5, 0, 0.48, 0.46, -90, 90), _ellipse(0.5, 0, 0.28, 0.26, 90, -90)])
    side = _poly((-0.75, -0.75), (0.55, -0.75), (0.42, 0.8), (-0.62, 0.8))
    return [("accent", ring), ("body", side), ("dark", _ellipse(-0.1, -0.75, 0.65, 0.16))]


def _fish() -> list[Shape]:
    tail = _poly((0.5, 0), (1, -0.5), (0.88, 0), (1, 0.5))
    fin = _poly((-0.2, -0.4), (0.15, -0.8), (0.35, -0.3))
    return [
        ("accent", tail),
        ("accent", fin),
        ("body", _ellipse(-0.2, 0, 0.8, 0.45)),
        ("light", _ellipse(-0.6, -0.1, 0.15, 0.15)),
        ("dark", _ellipse(-0.62, -0.1, 0.07, 0.07)),
    ]


def _flower() -> list[Shape]:
    angles = np.radians(np.arange(6) * 60)
    petals = [_ellipse(0.52 * np.cos(a), 0.52 * np.sin(a), 0.36, 0.36) for a in angles]
    return [("body", petal) for petal in petals] + [("accent", _ellipse(0, 0, 0.34, 0.34))]


def _house() -> list[Shape]:
    return [
        ("body", _box(0, 0.35, 0.7, 0.6)),
        ("accent", _poly((-0.95, -0.2), (0, -1), (0.95, -0.2))),
        ("dark", _box(-0.25, 0.6, 0.17, 0.35)),
        ("light", _box(0.33, 0.25, 0.19, 0.19)),
    ]


def _key() -> list[Shape]:
    bow = np.vstack([_ellipse(-0.55, 0, 0.45, 0.45), _ellipse(-0.55, 0, 0.2, 0.2, 360, 0)])
    bits = [_box(x, 0.27, 0.08, 0.2) for x in (0.55, 0.85)]
    return [("body", bow), ("body", _box(0.42, 0, 0.54, 0.12))] + [("body", bit) for bit in bits]


def _mushroom() -> list[Shape]:
    spots = [_ellipse(x, y, 0.13, 0.1) for x, y in ((-0.45, -0.25), (0.05, -0.5), (0.5, -0.2))]
    stem = _poly((-0.25, 0), (0.25, 0), (0.35, 0.95), (-0.35, 0.95))
    cap = _ellipse(0, 0.05, 0.95, 0.9, 180, 360)
    return [("light", stem), ("body", cap)] + [("light", spot) for spot in spots]


def _rocket() -> list[Shape]:
    fins = [_poly((s * 0.25, 0.3), (s * 0.75, 0.95), (s * 0.2, 0.75)) for s in (-1, 1)]
    hull = np.vstack([_ellipse(0, -0.1, 0.36, 0.9, 180, 360), _poly((0.3, 0.75), (-0.3, 0.75))])
    flame = _poly((-0.18, 0.75), (0.18, 0.75), (0, 1.05))
    return [
        *(("accent", fin) for fin in fins),
        ("light", flame),
        ("body", hull),
        ("light", _ellipse(0, -0.3, 0.19, 0.19)),
        ("dark", _ellipse(0, -0.3, 0.11, 0.11)),
    ]


def _sailboat() -> list[Shape]:
    return [
        ("dark", _box(0, -0.25, 0.04, 0.75)),
        ("accent", _poly((0.1, -0.95), (0.1, 0.3), (0.8, 0.3))),
        ("light", _poly((-0.1, -0.7), (-0.1, 0.3), (-0.65, 0.3))),
        ("body", _poly((-0.95, 0.45), (0.95, 0.45), (0.6, 0.9), (-0.6, 0.9))),
    ]


def _tree() -> list[Shape]:
    tiers = [(-1.0, -0.3, 0.42), (-0.65, 0.15, 0.6), (-0.25, 0.6, 0.78)]
    leaves = [_poly((0, top), (-half, low), (half, low)) for top, low, half in tiers]
    return [("dark", _box(0, 0.75, 0.13, 0.22))] + [("body", tier) for tier in reversed(leaves)]


def _umbrella() -> list[Shape]:
    canopy = np.vstack([
        _ellipse(0, 0, 0.98, 0.85, 180, 360),
        *(_ellipse(x, 0, 0.245, 0.16, 0, -180) for x in (0.735, 0.245, -0.245, -0.735)),
    ])  # fmt: skip
    hook = np.vstack(
        [_ellipse(0.16, 0.78, 0.2, 0.2, 180, 0), _ellipse(0.16, 0.78, 0.1, 0.1, 0, 180)]
    )
    panel = _poly((0, -0.85), (0.245, -0.02), (-0.245, -0.02))
    return [
        ("dark", _box(0, 0.38, 0.05, 0.42)),
        ("dark", hook),
        ("body", canopy),
        ("accent", panel),
    ]


CLASSES: dict[str, Callable[[], list[Shape]]] = {
    "butterfly": _butterfly,
    "car": _car,
    "cup": _cup,
    "fish": _fish,
    "flower": _flower,
    "house": _house,
    "key": _key,
    "mushroom": _mushroom,
    "rocket": _rocket,
    "sailboat": _sailboat,
    "tree": _tree,
    "umbrella": _umbrella,
}
"""Class name -> function that returns the shapes of one object; the order is the class index."""
