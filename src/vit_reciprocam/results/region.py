"""Find the region of a picture that a model saw, on which its maps are drawn."""

from __future__ import annotations

from PIL import Image

from vit_reciprocam.errors import InputError
from vit_reciprocam.pictures.preprocess import Preprocess

__all__ = ["find_region"]

_SHAPE_TOLERANCE = 0.05  # largest relative difference between a picture's and the grid's shape


def find_region(
    picture: Image.Image,
    seen: tuple[int, int] | None,
    preprocess: Preprocess | None,
    grid: tuple[int, ...],
) -> tuple[int, int, int, int]:
    """Return the box (left, top, right, bottom) of a picture that the model saw.

    Args:
        picture: The whole picture that was explained, or the region of it that the model saw.
        seen: Width and height of that region; None if not known.
        preprocess: Preprocessing that cut it out of the whole picture; None if not known.
        grid: Rows and columns of the patches.

    Raises:
        InputError: If the picture is neither, or, when the region is not known, has another shape
            than the grid.
    """
    whole = (0, 0, picture.width, picture.height)
    if seen and preprocess:
        for box in (whole, preprocess.box(picture)):
            if (box[2] - box[0], box[3] - box[1]) == seen:
                return box
        raise InputError(
            f"picture is {picture.width}x{picture.height} pixels: pass the whole picture that "
            f"was explained, or the {seen[0]}x{seen[1]} region of it that the model saw"
        )
    rows, columns = grid
    if abs(picture.width * rows / (picture.height * columns) - 1) > _SHAPE_TOLERANCE:
        raise InputError(
            f"picture is {picture.width}x{picture.height} pixels, the model's grid "
            f"{columns}x{rows}: crop or resize it as it was for the model, or use "
            "vit_reciprocam.explain, which knows where that lies in the whole picture"
        )
    return whole
