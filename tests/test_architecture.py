"""The tree of the package: few files at its root, and imports that run one way."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1] / "richkd"
# From the bottom up: a room imports from itself and from those before it.
ROOMS = [
    "core",
    "config",
    "data",
    "models",
    "losses",
    "store",
    "training",
    "teachers",
    "precompute",
    "distill",
    "analysis",
    "sweep",
    "report",
    "tools",
    "run",
    "demo",
    "__init__",
    "cli",
    "__main__",
]
AT_THE_ROOT = 8


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in ROOT.rglob("*.py")}


def imports(module: str) -> set[str]:
    """The modules of the package that one imports, anywhere in it, for types as well."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return {name for name in found if name in MODULES} - {module}


GRAPH = {module: imports(module) for module in MODULES}


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def test_few_files_lie_at_the_root() -> None:
    files = [path.name for path in ROOT.iterdir() if path.is_file()]
    assert len(files) <= AT_THE_ROOT, sorted(files)


def test_every_room_is_known() -> None:
    assert {room(module) for module in MODULES} <= {*ROOMS}


def test_imports_run_one_way() -> None:
    upwards = [
        f"{module} imports {other}"
        for module in MODULES
        for other in GRAPH[module]
        if ROOMS.index(room(other)) > ROOMS.index(room(module))
    ]
    assert not upwards


def test_there_are_no_circles() -> None:
    done: set[str] = set()
    while ready := [m for m in GRAPH if m not in done and GRAPH[m] <= done]:
        done |= {*ready}
    assert done == {*GRAPH}, sorted({*GRAPH} - done)


def test_storage_and_mathematics_do_not_know_the_settings() -> None:
    knowing = [
        module
        for module in MODULES
        if room(module) in ("core", "store") and "richkd.config.settings" in GRAPH[module]
    ]
    assert not knowing


def test_teachers_do_not_know_the_writer() -> None:
    knowing = [module for module in MODULES if "richkd.store.writer" in GRAPH[module]]
    assert not [module for module in knowing if room(module) == "teachers"]
