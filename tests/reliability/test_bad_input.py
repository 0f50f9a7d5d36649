"""Generated mistakes, a thousand in CI: one line, exit code 2, nothing on the disk changed."""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from helpers import changed, tree
from hypothesis import assume, given
from hypothesis import strategies as st

from richkd.config.settings import SECTIONS
from richkd.losses.method import METHODS

Fails = Callable[..., str]
pytestmark = pytest.mark.fault


# what a process can be given: no NUL, no lone surrogates
words = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
not_integers = words.filter(lambda text: not text.strip().lstrip("+-").replace("_", "").isdigit())
below_one = st.integers(max_value=0).map(str)
not_numbers = st.one_of(not_integers.filter(lambda t: not _is_float(t)), st.just("nan"))


def _is_float(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def outside(low: float, high: float) -> st.SearchStrategy[str]:
    """Numbers that are not in [low, high], and what is no number."""
    numbers = st.floats(allow_nan=True).filter(lambda value: not low <= value <= high)
    return st.one_of(numbers.map(repr), not_numbers)


def other_than(*names: str) -> st.SearchStrategy[str]:
    """Words, and names with a letter too many, too few, or another."""
    near = st.tuples(st.sampled_from(names), st.characters(categories=["Ll"])).map("".join)
    shorter = st.sampled_from(names).map(lambda name: name[:-1])
    return st.one_of(words, near, shorter).filter(lambda text: text not in names)


COUNT = st.one_of(not_integers, below_one)
BAD_FLAGS: dict[str, st.SearchStrategy[str]] = {
    "epochs": COUNT,
    "batch-size": COUNT,
    "eval-every": COUNT,
    "lr": outside(5e-324, 1.7e308),
    "momentum": outside(0, 1 - 1e-16),
    "weight-decay": outside(0, 1 - 1e-16),
    "schedule": other_than("step", "cosine"),
    "milestones": st.one_of(
        st.sampled_from(["0", "5,5", "9,3", "240", "1.5", "1,", "30;60"]),
        not_integers.filter(lambda text: "," not in text),
    ),
    "precision": other_than("auto", "float32", "bfloat16"),
    "seed": st.one_of(
        not_integers, st.integers(max_value=-1).map(str), st.integers(min_value=2**32).map(str)
    ),
    "alpha": outside(0, 1).filter(lambda text: text != "auto"),
    "scale": outside(5e-324, 1.7e308).filter(lambda text: text not in ("native", "raw")),
    "holdout": outside(0, 0.9),
    "target": other_than("teacher", "clip", "fused").filter(bool),
    "clip-head": other_than("zero-shot", "probe"),
    "method": other_than(*METHODS),
    "set": words.filter(lambda text: "=" not in text),
    "prompts": st.one_of(
        st.just("99"), st.just("0,0"), not_integers.filter(lambda text: "," not in text)
    ),
    "student-set": words.filter(lambda text: "=" not in text),
    "no-such-flag": words,
}


@given(flag=st.sampled_from(sorted(BAD_FLAGS)), data=st.data())
def test_flags(
    fails: Fails,
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flag: str,
    data: st.DataObject,
) -> None:
    value = data.draw(BAD_FLAGS[flag])
    monkeypatch.chdir(tmp_path)
    fails("distill", "--cache", store, "--student", "resnet8", f"--{flag}={value}")
    assert not tree(tmp_path) and not list(tmp_path.iterdir())


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), words),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(words, inner, max_size=3)),
    max_leaves=4,
)
toml_values = st.recursive(
    st.one_of(st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(), words),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)
NUMBERS = ("epochs", "batch_size", "eval_every", "lr", "momentum", "weight_decay", "seed")


@given(data=st.data())
def test_recipes(
    fails: Fails, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: st.DataObject
) -> None:
    import tomli_w

    kind = data.draw(st.sampled_from(["text", "table", "key", "type"]))
    if kind == "text":
        text = data.draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
        with suppress(tomllib.TOMLDecodeError):
            assume(tomllib.loads(text.replace("\r\n", "\n")) != {})
        assume(not text.strip().startswith(("about", "published")))
    else:
        values: dict[str, Any] = {}
        if kind == "table":
            known = {*SECTIONS, "about", "published"}
            values[data.draw(words.filter(lambda name: name not in known))] = {}
        elif kind == "key":
            keys = SECTIONS["distill"].__dataclass_fields__
            values["distill"] = {data.draw(words.filter(lambda name: name not in keys)): 1}
        else:
            name = data.draw(st.sampled_from(NUMBERS))
            wrong = toml_values.filter(lambda v: isinstance(v, bool | str | list))
            values["distill"] = {name: data.draw(wrong)}
        text = tomli_w.dumps(values)
    folder = tmp_path / "recipes"
    folder.mkdir(exist_ok=True)
    path = folder / "r.toml"
    path.write_bytes(text.encode())
    monkeypatch.chdir(tmp_path)
    fails("distill", "--cache", store, "--student", "resnet8", "--recipe", path)
    assert list(tree(tmp_path)) == ["recipes/r.toml"]


MUTATIONS = ("missing", "cut", "longer", "flipped", "swapped", "moved", "metadata", "manifest")


@given(data=st.data())
def test_stores(
    fails: Fails, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: st.DataObject
) -> None:
    """Parts missing, cut, swapped, retyped, reshaped: `verify` finds it, `distill` never trains."""
    copy = tmp_path / "stores" / "copy.zarr"
    if copy.exists():
        shutil.rmtree(copy)
    shutil.copytree(store, copy)
    files = sorted(str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file())
    arrays = sorted(str(path.parent.relative_to(copy)) for path in copy.rglob("zarr.json"))
    kind = data.draw(st.sampled_from(MUTATIONS))
    file = copy / data.draw(st.sampled_from(files))
    content = file.read_bytes()
    if kind == "missing":
        file.unlink()
    elif kind == "cut":
        file.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    elif kind == "longer":
        file.write_bytes(content + data.draw(st.binary(min_size=1, max_size=8)))
    elif kind == "flipped":
        at = data.draw(st.integers(0, len(content) - 1))
        new = bytearray(content)
        new[at] ^= data.draw(st.integers(1, 255))
        file.write_bytes(new)
    elif kind == "swapped":
        other = copy / data.draw(st.sampled_from(files))
        assume(other.read_bytes() != content)
        file.write_bytes(other.read_bytes())
        other.write_bytes(content)
    elif kind == "moved":
        one, other = (copy / data.draw(st.sampled_from(arrays)) for _ in range(2))
        assume(one != other and one not in other.parents and other not in one.parents)
        assume(tree(one) != tree(other))
        one.rename(copy / "aside")
        other.rename(one)
        (copy / "aside").rename(other)
    elif kind == "metadata":
        path = copy / data.draw(st.sampled_from(arrays)) / "zarr.json"
        change(path, data, lambda document: document)
    else:
        change(copy / "zarr.json", data, lambda document: document["attributes"])
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    fails("verify", copy)
    if kind in ("metadata", "manifest", "missing"):
        fails("distill", "--cache", copy, "--student", "resnet8", "--epochs", 1)
    assert changed(before, tree(tmp_path)) == []


def change(path: Path, data: st.DataObject, part: Callable[[Any], dict[str, Any]]) -> None:
    """Another value for one key of a JSON document."""
    document = json.loads(path.read_text())
    entries = part(document)
    key = data.draw(st.sampled_from(sorted(entries)))
    value = data.draw(json_values)
    assume(json.dumps(value) != json.dumps(entries[key]))
    entries[key] = value
    path.write_text(json.dumps(document, indent=2))
