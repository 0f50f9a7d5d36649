"""Prompt templates, from a named set or a file."""

from __future__ import annotations

from pathlib import Path

from richkd.core.errors import RichKDError, unknown
from richkd.core.text_files import read_text

PROMPT_SETS: dict[str, tuple[str, ...]] = {
    # as in the RichKD release
    "richkd": (
        "a photo of a {}",
        "a blurry photo of a {}",
        "a cropped photo of a {}",
        "a close-up photo of a {}",
        "a low resolution photo of a {}",
        "a bright photo of a {}",
        "a picture of a {}",
        "a detailed image of a {}",
        "a sketch of a {}",
        "a natural photo of a {} in the wild",
        "a realistic image of a {}",
        "a high quality photo of a {}",
    ),
    "single": ("a photo of a {}",),
}


def load_prompts(name_or_file: str) -> tuple[str, ...]:
    """Load prompt templates, each with one `{}` for the class name.

    Args:
        name_or_file: name of a set, or a text file with one template per line
            (empty lines and lines that begin with # are ignored).

    Raises:
        RichKDError: there is no such set or file, the file has no templates, or a line does not
            have exactly one `{}`.
    """
    if name_or_file in PROMPT_SETS:
        return PROMPT_SETS[name_or_file]
    path = Path(name_or_file)
    if not path.is_file():
        raise unknown("prompt set, nor is there such a file:", name_or_file, PROMPT_SETS)
    try:
        lines = read_text(path).split("\n")
    except (OSError, ValueError) as error:
        raise RichKDError(
            f"cannot read prompts from {path}: {error}", code="prompts-unreadable"
        ) from None
    templates = []
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        if text.count("{}") != 1 or text.count("{") != 1 or text.count("}") != 1:
            raise RichKDError(
                f"{path} line {number}: {text!r} must contain exactly one {{}}, for the class name",
                code="prompt-malformed",
            )
        templates.append(text)
    if not templates:
        raise RichKDError(
            f"{path} has no prompts; write one template per line, with {{}} for the class name",
            code="prompts-empty",
        )
    return tuple(templates)


def fill(template: str, class_name: str) -> str:
    """Replace the `{}` of a template by a class name, which is never treated as a format itself."""
    return template.replace("{}", class_name)
