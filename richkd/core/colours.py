"""Colours as people write them."""

from __future__ import annotations

from PIL import ImageColor

from richkd.core.errors import RichKDError


def read_colour(text: str) -> tuple[int, int, int]:
    """A colour by a name of CSS (white, black, …) or as #RRGGBB: three bytes.

    Raises:
        RichKDError: the text is neither.
    """
    try:
        red, green, blue = ImageColor.getrgb(text)[:3]
    except ValueError:
        raise RichKDError(
            f"background = {text!r}: must be a colour by its name, as white or black, or #RRGGBB",
            code="value-malformed",
        ) from None
    return red, green, blue
