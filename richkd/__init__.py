"""RichKD: distil image models from a CNN teacher fused with CLIP, cached once.

Stage one (`richkd.precompute`) runs the teachers and writes a Zarr cache; stage two
(`richkd.distill`) trains students from the cache. Public names are imported on first use, so that
`import richkd` is fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from richkd import losses as losses
    from richkd.core.errors import RichKDError as RichKDError
    from richkd.data.views import apply_views as apply_views
    from richkd.models import create_model as create_model
    from richkd.models import forward as forward
    from richkd.store.reader import TeacherCache as TeacherCache
    from richkd.store.reader import open_cache as open_cache
    from richkd.tools.samples import torch_dataset as torch_dataset
    from richkd.tools.samples import view_images as view_images
    from richkd.training.run_folder import load_student as load_student

_HOME = {
    "RichKDError": "richkd.core.errors",
    "TeacherCache": "richkd.store.reader",
    "apply_views": "richkd.data.views",
    "create_model": "richkd.models",
    "forward": "richkd.models",
    "load_student": "richkd.training.run_folder",
    "open_cache": "richkd.store.reader",
    "torch_dataset": "richkd.tools.samples",
    "view_images": "richkd.tools.samples",
}

__all__ = [
    "RichKDError",
    "TeacherCache",
    "apply_views",
    "create_model",
    "forward",
    "load_student",
    "losses",
    "open_cache",
    "torch_dataset",
    "view_images",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from richkd.core.versions import richkd_version

        return richkd_version()
    if name == "losses":
        return importlib.import_module("richkd.losses")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'richkd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
