"""Prompt templates: the sets known by name, and those read from a file."""

from __future__ import annotations

from pathlib import Path

from richkd.core.errors import RichKDError, unknown
from richkd.core.text_files import read_text

PROMPT_SETS: dict[str, tuple[str, ...]] = {
    # the twelve of the RichKD release
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
    """Templates, each with one `{}` for the class name.

    Args:
        name_or_file: a set's name, or a text file with one template a line
            (empty lines and lines that start with # do not count).

    Raises:
        RichKDError: no such set or file, an empty file, or a line without exactly one `{}`.
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
                f"{path} line {number}: {text!r} needs exactly one {{}} for the class name",
                code="prompt-malformed",
            )
        templates.append(text)
    if not templates:
        raise RichKDError(
            f"{path} holds no prompts; write one template a line, with one {{}}",
            code="prompts-empty",
        )
    return tuple(templates)


def fill(template: str, class_name: str) -> str:
    """The template with the class name in place of `{}`; the name is data, never a format."""
    return template.replace("{}", class_name)
