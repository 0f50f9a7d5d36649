"""Names of the teachers in tables, plots and messages, by their keys in results."""

from __future__ import annotations

# short names, for tables and plots of teachers alone
NAMES = {
    "cnn": "CNN teacher",
    "clip": "CLIP",
    "fused": "fused",
    "raw": "fused, raw scale",
    "native": "fused, native scale",
}
# full names, beside students and other models
FULL_NAMES = {"cnn": "CNN teacher", "clip": "CLIP zero-shot", "fused": "fused teacher"}


def name_of(kind: str) -> str:
    """Return a teacher's short name; an added one has the name that it was given."""
    return NAMES.get(kind, kind)
