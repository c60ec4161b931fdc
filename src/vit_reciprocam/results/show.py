"""Show pictures: in a notebook, in the system's viewer, or as HTML."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable

from PIL import Image

from vit_reciprocam.pictures.render import png

__all__ = ["show_pictures", "write_img"]


def show_pictures(pictures: Iterable[Image.Image]) -> None:
    """Show pictures inline in a notebook, else in the system's viewer."""
    try:
        from IPython import get_ipython

        in_notebook = get_ipython() is not None
    except ImportError:
        in_notebook = False
    for picture in pictures:
        if in_notebook:
            from IPython.display import display

            display(picture)
        else:
            picture.show()


def write_img(picture: Image.Image, alt: str) -> str:
    """Return an HTML img that holds the picture itself, and says `alt` to who cannot see it."""
    source = f"data:image/png;base64,{base64.b64encode(png(picture)).decode()}"
    return f'<img style="max-width:100%" alt="{html.escape(alt)}" src="{source}">'
