"""Prompt sets and prompt files."""

from pathlib import Path

import pytest

from richkd.core.errors import RichKDError
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
    ("content", "message"),
    [
        ("", "holds no prompts"),
        ("no place", "line 1.*exactly one"),
        ("a {}\na {} {}", "line 2.*exactly one"),
        ("a {0.__class__}", "line 1.*exactly one"),
    ],
)
def test_bad_files(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text(content)
    with pytest.raises(RichKDError, match=message):
        load_prompts(str(file))


def test_unknown() -> None:
    with pytest.raises(RichKDError, match=r"prompt set.*'richkdd'.*richkd, single"):
        load_prompts("richkdd")
