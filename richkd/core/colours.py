"""Colours by CSS name or hexadecimal code."""

from __future__ import annotations

from PIL import ImageColor

from richkd.core.errors import RichKDError


def read_colour(text: str) -> tuple[int, int, int]:
    """Return the red, green and blue bytes of a CSS colour name (white, …) or #RRGGBB.

    Raises:
        RichKDError: the text is neither.
    """
    try:
        red, green, blue = ImageColor.getrgb(text)[:3]
    except ValueError:
        raise RichKDError(
            f"background = {text!r}: must be the name of a colour, e.g. white, or #RRGGBB",
            code="value-malformed",
        ) from None
    return red, green, blue
