"""Names of the teachers in tables, plots and messages, by their keys in results."""

from __future__ import annotations

# beside others of their kind, where little room is
NAMES = {
    "cnn": "CNN teacher",
    "clip": "CLIP",
    "fused": "fused",
    "raw": "fused, raw scale",
    "native": "fused, native scale",
}
# beside students and other models
FULL_NAMES = {"cnn": "CNN teacher", "clip": "CLIP zero-shot", "fused": "fused teacher"}
