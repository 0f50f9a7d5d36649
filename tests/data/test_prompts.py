"""Prompt sets and prompt files."""

from pathlib import Path

import pytest
from helpers import refuses

from richkd.data.prompts import fill, load_prompts


def test_released_set_has_twelve() -> None:
    prompts = load_prompts("richkd")
    assert len(set(prompts)) == 12 and prompts[0] == "a photo of a {}"
    assert fill(prompts[9], "tree {0} frog") == "a natural photo of a tree {0} frog in the wild"


def test_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("# mine\n\na drawing of a {}\n  a {} outdoors \n")
    assert load_prompts(str(file)) == ("a drawing of a {}", "a {} outdoors")


@pytest.mark.parametrize(
    ("content", "code", "place"),
    [
        ("", "prompts-empty", "prompts.txt"),
        ("no place", "prompt-malformed", "line 1"),
        ("a {}\na {} {}", "prompt-malformed", "line 2"),
        ("a {0.__class__}", "prompt-malformed", "line 1"),
    ],
)
def test_bad_files(tmp_path: Path, content: str, code: str, place: str) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text(content)
    with refuses(code, file, place, "{}"):
        load_prompts(str(file))


def test_unknown() -> None:
    with refuses("unknown-name", "'richkdd'", "richkd, single"):
        load_prompts("richkdd")
