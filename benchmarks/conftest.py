"""The fixtures of the tests, for the measurements: `pytest benchmarks`."""

# ruff: noqa: F401
from conftest import (
    clip_dir,
    few_test_images,
    make_store,
    own_home,
    session_home,
    shapes_teacher,
    store,
)
