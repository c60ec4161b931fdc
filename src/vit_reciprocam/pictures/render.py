"""Draw saliency maps: colour maps, overlays, and panels side by side."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vit_reciprocam.errors import InputError, check_choice

__all__ = [
    "COLORMAPS",
    "colorize",
    "enlarge",
    "overlay",
    "overlay_signed",
    "panels",
    "png",
]

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
_ON_ITS_OWN = "each map is scaled on its own"
_AGAINST, _FOR = np.array([[0, 90, 181], [230, 97, 0]])  # blue and orange: seen by every reader


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


def overlay_signed(
    picture: Image.Image, values: np.ndarray, *, opacity: float = 0.55
) -> Image.Image:
    """Return a picture in grey, over which positive values (h, w) lie in orange, negative in blue.

    The values are divided by the largest absolute one, which has the given opacity; at zero only
    the picture is seen. It is grey because its own blue and orange would look like evidence.
    """
    if not 0 <= opacity <= 1:
        raise InputError(f"opacity must be between 0 and 1; got {opacity}")
    most = np.abs(values).max()
    shares = values / most if most > 0 else values
    # `enlarge` keeps what it draws in [0, 1]: zero is put into the middle and taken back
    smooth = 2 * enlarge((shares + 1) / 2, (picture.height, picture.width)) - 1
    ink = np.where(smooth[..., None] > 0, _FOR, _AGAINST)
    cover = opacity * np.abs(smooth)[..., None]
    mixed = (1 - cover) * np.asarray(picture.convert("L"))[..., None] + cover * ink
    return Image.fromarray(mixed.round().astype(np.uint8))


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
    against: bool = False,
    height: int = 320,
    columns: int = 6,
) -> Image.Image:
    """Return a sheet of pictures, each above its caption, with a legend of the colours below.

    There is at least one picture. All are scaled to `height` pixels, or to less if they are more
    than four times as wide as high, and stand in rows of at most `columns`. The first line of a
    caption is cut if it is too long; for further lines, divided by line ends, the columns are made
    wide enough. The legend is that of the colour map, or, with `against`, of `overlay_signed`.
    """
    gap, text = height // 32, max(11, height // 18)
    line = text + gap // 2
    font = ImageFont.load_default(text)
    sizes = [_panel_size(picture, height) for picture in pictures]
    lines = [caption.split("\n") for caption in captions]
    further = [font.getlength(words) for caption in lines for words in caption[1:]]
    width = max([size[0] for size in sizes] + [math.ceil(length) for length in further])
    columns = min(columns, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    cell_w = width + gap
    cell_h = height + 2 * gap + text + line * (max(len(caption) for caption in lines) - 1)
    bottom = rows * cell_h + gap
    sheet_w = columns * cell_w + gap
    bar, first, last = _draw_legend(text, colormap, against)
    left = gap + round(font.getlength(f"{first}  "))
    right = left + bar.width + gap
    legend = [f"{last}; {_ON_ITS_OWN}"]
    if right + font.getlength(legend[0]) + gap > sheet_w:
        legend = [last, _ON_ITS_OWN]
    sheet = Image.new("RGB", (sheet_w, bottom + text + gap + line * (len(legend) - 1)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, picture in enumerate(pictures):
        x, y = gap + number % columns * cell_w, gap + number // columns * cell_h
        sheet.paste(picture.resize(sizes[number], Image.Resampling.LANCZOS), (x, y))
        for place, words in enumerate(lines[number]):
            top = y + height + gap // 2 + place * line
            draw.text((x, top), _shorten(words, font, width), fill=_INK, font=font)
    sheet.paste(bar, (left, bottom + text // 8))
    draw.text((gap, bottom), first, fill=_INK, font=font)
    for place, words in enumerate(legend):
        x = gap if place else right
        words = _shorten(words, font, sheet_w - x)
        draw.text((x, bottom + place * line), words, fill=_INK, font=font)
    return sheet


def _draw_legend(height: int, colormap: str, against: bool) -> tuple[Image.Image, str, str]:
    """Return a bar of all colours, and the words for its left and its right end."""
    ramp = np.tile(np.linspace(0, 1, 8 * height), (height, 1))
    if against:
        white = Image.new("RGB", (8 * height, height), "white")
        return overlay_signed(white, 2 * ramp - 1, opacity=1), "against", "for the class"
    return Image.fromarray(colorize(ramp, colormap)), "weak", "strong"


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
