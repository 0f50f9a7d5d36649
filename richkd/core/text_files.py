"""Read text files that people write: prompts, class names and recipes."""

from __future__ import annotations

import codecs
from pathlib import Path


def read_text(path: Path) -> str:
    """Return a text with \\n line ends: UTF-8, or UTF-16 or UTF-32 with a byte-order mark.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not such a text; the message gives the reason.
    """
    content = path.read_bytes()
    marks = {
        codecs.BOM_UTF8: "utf-8-sig",
        codecs.BOM_UTF32_LE: "utf-32",
        codecs.BOM_UTF32_BE: "utf-32",
        codecs.BOM_UTF16_LE: "utf-16",
        codecs.BOM_UTF16_BE: "utf-16",
    }
    encoding = next((name for mark, name in marks.items() if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        before = content[: error.start].replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        line = before.count(b"\n") + 1
        raise ValueError(
            f"line {line} is not {encoding.upper().removesuffix('-SIG')}; save it as UTF-8"
        ) from None
    if "\0" in text:
        raise ValueError(
            "it contains zero bytes, e.g. UTF-16 without a byte-order mark; save it as UTF-8"
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")
