"""The documentation builds without a warning, its links resolve, and its commands work.

The kind of a fenced block says how it is tested. `python` blocks run. `bash` blocks contain richkd
commands and run too, page by page in one folder, unless the line before names what they need
(`<!-- network -->`, `<!-- gpu -->`) or the test that runs them (`<!-- tested: FILE -->`); those are
only parsed by the command line. The README's two `sh` blocks are run by CI itself. `text` and
`toml` blocks are not run.
"""

from __future__ import annotations

import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, fields
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import optional
import pytest
import typer
from forked import Forks

import richkd
from richkd.cli import app
from richkd.config import recipes
from richkd.config.settings import SECTIONS
from richkd.losses import METHODS

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "cache" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
FENCE = re.compile(
    r"(?:^<!-- (?P<mark>.*?) -->\n)?^```(?P<kind>[^\n]*)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
SHOWN = {"text", "toml"}


@dataclass(frozen=True)
class Block:
    page: Path
    kind: str
    mark: str
    code: str


def blocks(page: Path) -> list[Block]:
    found = FENCE.finditer(page.read_text(encoding="utf-8"))
    return [
        Block(page, m["kind"], m["mark"] or "", m["code"])
        for m in found
        if not m["kind"].startswith("{")
    ]


def commands(block: Block) -> list[list[str]]:
    """Return the commands of a block, each split into words."""
    lines = block.code.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


ALL = [block for page in PAGES for block in blocks(page)]


# --- the site ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    optional.require("sphinx")
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "sphinx",
            "-q",
            "-W",
            "--keep-going",
            "-b",
            "html",
            "-d",
            str(out / "trees"),
            str(ROOT / "docs"),
            str(out / "html"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return out / "html"


class Links(HTMLParser):
    """The link targets, loaded resources and anchors of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if given.get("id"):
            self.anchors.add(str(given["id"]))
        if tag == "a" and given.get("href"):
            self.targets.append(str(given["href"]))
        loads = given.get("src") or (given.get("href") if tag == "link" else None)
        if loads:
            self.loaded.append(loads)


@pytest.mark.slow
def test_links_resolve_and_nothing_is_loaded_from_the_network(site: Path) -> None:
    pages = {}
    for file in site.rglob("*.html"):
        pages[file] = Links()
        pages[file].feed(file.read_text(encoding="utf-8"))
    assert len(pages) >= 9
    checked = 0
    for file, page in pages.items():
        assert not [url for url in page.loaded if re.match(r"(https?:)?//", url)], file
        for target in page.targets + page.loaded:
            if re.match(r"[a-z]+:", target):
                continue
            path, _, anchor = target.partition("#")
            linked = (file.parent / path.partition("?")[0]).resolve() if path else file
            assert linked.exists(), f"{file.name}: {target}"
            if anchor and linked.suffix == ".html":
                assert anchor in pages[linked].anchors, f"{file.name}: {target}"
            checked += 1
    assert checked > 200


@pytest.mark.slow
def test_the_site_has_every_key_method_command_and_public_name(site: Path) -> None:
    def text(page: str) -> str:
        return re.sub(r"<[^>]+>", "", (site / f"{page}.html").read_text(encoding="utf-8"))

    settings = text("methods-and-recipes")
    for kind in SECTIONS.values():
        for field in fields(kind):
            assert re.search(rf"\b{field.name}\b", settings), field.name
    assert all(re.search(rf"^{re.escape(name)}$", settings, re.MULTILINE) for name in METHODS)
    assert all(f"richkd {name}" in text("command-line") for name in group().commands)
    assert all(name in text("python") for name in richkd.__all__)
    for example in (ROOT / "docs" / "examples").glob("*.py"):
        assert example.read_text().removeprefix('"""').split(":")[0] in text("examples")
    assert "<math" in (site / "method.html").read_text()


# --- fenced blocks -------------------------------------------------------------------------------


def group() -> Any:
    return typer.main.get_command(app)


def test_every_block_has_a_known_kind_and_mark() -> None:
    for block in ALL:
        where = f"{block.page.relative_to(ROOT)}: {block.code[:60]!r}"
        assert block.kind in {*SHOWN, "python", "bash", "sh"}, where
        if block.kind == "sh":
            assert block.page == ROOT / "README.md", where
        if block.mark.startswith("tested: "):
            assert (ROOT / block.mark.removeprefix("tested: ")).is_file(), where
        elif block.kind == "bash":
            assert block.mark in ("", "network", "gpu"), where
        if block.kind == "toml":
            assert tomllib.loads(block.code), where
    assert len([block for block in blocks(ROOT / "README.md") if block.kind == "sh"]) == 2


@pytest.mark.parametrize(
    "words",
    [
        words
        for block in ALL
        if block.kind == "bash"
        for words in commands(block)
        if words[0] == "richkd"
    ],
    ids=" ".join,
)
def test_every_command_parses(words: list[str]) -> None:
    if words[1].startswith("--"):
        return
    command = group().get_command(typer.Context(group()), words[1])
    assert command is not None, words
    assert command.make_context(words[1], words[2:])


def test_every_recipe_loads(tmp_path: Path) -> None:
    shown = [block for block in ALL if block.kind == "toml"]
    assert shown
    for block in shown:
        file = tmp_path / "shown.toml"
        file.write_text(block.code, encoding="utf-8")
        assert recipes.load(str(file)).tables


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.name != "CONTRIBUTING.md"],
    ids=lambda page: f"{page.parent.name}-{page.stem}",
)
def test_the_blocks_of_a_page_run(
    page: Path,
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run: Callable[..., Any],
    forks: Forks,
) -> None:
    """Run them in a folder in which a small cache stands in for the one of CIFAR-100."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(store, tmp_path / "cache" / "cifar100.zarr")
    for block in blocks(page):
        if block.kind == "python":
            done = forks.run_python(block.code)
            assert done.code == 0, f"{block.code}\n{done.err}"
        elif block.kind == "bash" and not block.mark:
            for words in commands(block):
                assert words[0] == "richkd", words
                outcome = run(*words[1:])
                assert outcome.code == 0, f"{words}\n{outcome.err}"


@pytest.mark.slow
def test_both_stages_in_the_open(tmp_path: Path) -> None:
    script = ROOT / "docs" / "two_stages.py"
    assert len(script.read_text(encoding="utf-8").splitlines()) <= 150
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    top1 = dict(line.removesuffix(" %").split(": ") for line in done.stdout.splitlines())
    assert len(top1) == 6
    assert float(top1["student by RichKD L"]) > 10  # chance is 6.25


# --- names and paths -----------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}-{page.stem}")
def test_modules_and_files_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"`(richkd(?:\.\w+)+)`", text):
        assert pkgutil.resolve_name(name), name
    for file in re.findall(r"`((?:richkd|tests|docs)/[\w/.-]+)`", text):
        assert (ROOT / file.replace("/NAME.toml", "")).exists(), file


# --- the README ----------------------------------------------------------------------------------


def test_the_readme_is_short_and_its_links_resolve() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 1300
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or (ROOT / target).is_file(), target
