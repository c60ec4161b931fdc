"""Draw saliency maps: colour maps, overlays, and panels side by side."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vit_reciprocam.errors import InputError, check_choice

__all__ = ["COLORMAPS", "colorize", "enlarge", "overlay", "panels", "png"]

_COLOURS = {
    "viridis": "440154 48186a 472d7b 424086 3b528b 33638d 2c728e 26828e 21918c "
    "1fa088 28ae80 3fbc73 5ec962 84d44b addc30 d8e219 fde725",
    "inferno": "000004 0b0724 210c4a 3d0965 57106e 71196e 8a226a a32c61 bc3754 "
    "d24644 e45a31 f1731d f98e09 fcac11 f9cb35 f2ea69 fcffa4",
    "cividis": "00224e 002e6a 1a386f 32436d 434e6c 535a6d 61656f 6f7073 7d7c78 "
    "8c8878 9b9476 aba072 bcae6c cdbb63 dec958 f0d846 fee838",
    "jet": "000080 0000c8 0000ff 0040ff 0080ff 00c0ff 16ffe1 49ffad 7dff7a "
    "b1ff46 e4ff13 ffd000 ff9400 ff5900 ff1e00 c40000 800000",
    "gray": "000000 ffffff",
}
COLORMAPS: dict[str, np.ndarray] = {
    name: np.array([list(bytes.fromhex(colour)) for colour in colours.split()])
    for name, colours in _COLOURS.items()
}
"""Name -> evenly spaced RGB anchors (n, 3), interpolated linearly.

viridis, inferno and cividis are matplotlib's (CC0). In them even steps of the map look like even
steps, also in print and to readers who are colour-blind. In jet they do not, but papers use it.
"""

_INK = "#222222"


def colorize(saliency: np.ndarray, colormap: str = "viridis") -> np.ndarray:
    """Return the colours of a map: (h, w) in [0, 1] -> (h, w, 3) uint8."""
    check_choice("colormap", colormap, COLORMAPS)
    anchors = COLORMAPS[colormap]
    places = np.linspace(0, 1, len(anchors))
    channels = [np.interp(saliency, places, anchors[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def enlarge(saliency: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return a map (h, w) at the size (height, width) of a picture: bicubic, kept in [0, 1]."""
    image = Image.fromarray(saliency.astype(np.float32))
    smooth = image.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return np.asarray(smooth).clip(0, 1)


def overlay(
    picture: Image.Image, saliency: np.ndarray, *, colormap: str = "viridis", opacity: float = 0.55
) -> Image.Image:
    """Return an RGB picture with its map (h, w), in [0, 1], laid over it at the picture's size.

    Opacity 0 shows the picture alone, 1 the map alone.
    """
    if not 0 <= opacity <= 1:
        raise InputError(f"opacity must be between 0 and 1; got {opacity}")
    colours = colorize(enlarge(saliency, (picture.height, picture.width)), colormap)
    return Image.blend(picture, Image.fromarray(colours), opacity)


def png(image: Image.Image) -> bytes:
    """Return a picture as the content of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def panels(
    pictures: Sequence[Image.Image],
    captions: Sequence[str],
    *,
    colormap: str = "viridis",
    height: int = 320,
    columns: int = 6,
) -> Image.Image:
    """Return a sheet of pictures, each above its caption, with a legend of the colour map below.

    There is at least one picture. All are scaled to `height` pixels, or to less if they are more
    than four times as wide as high, and stand in rows of at most `columns`. Long captions are cut.
    """
    gap, text = height // 32, max(11, height // 18)
    font = ImageFont.load_default(text)
    sizes = [_panel_size(picture, height) for picture in pictures]
    width = max(size[0] for size in sizes)
    columns = min(columns, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    cell_w, cell_h = width + gap, height + 2 * gap + text
    bottom = rows * cell_h + gap
    sheet = Image.new("RGB", (columns * cell_w + gap, bottom + text + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        x, y = gap + number % columns * cell_w, gap + number // columns * cell_h
        sheet.paste(picture.resize(sizes[number], Image.Resampling.LANCZOS), (x, y))
        draw.text((x, y + height + gap // 2), _shorten(caption, font, width), fill=_INK, font=font)
    bar = Image.fromarray(colorize(np.tile(np.linspace(0, 1, 8 * text), (text, 1)), colormap))
    left = gap + round(font.getlength("weak  "))
    right = left + bar.width + gap
    strong = _shorten("strong; each map is scaled for itself", font, sheet.width - right)
    sheet.paste(bar, (left, bottom + text // 8))
    draw.text((gap, bottom), "weak", fill=_INK, font=font)
    draw.text((right, bottom), strong, fill=_INK, font=font)
    return sheet


def _panel_size(picture: Image.Image, height: int) -> tuple[int, int]:
    """Return width and height of a panel: `height` high, but at most four times as wide."""
    scale = min(height / picture.height, 4 * height / picture.width)
    return max(1, round(picture.width * scale)), max(1, round(picture.height * scale))


def _shorten(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    """Return the text, cut with an ellipsis if it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
