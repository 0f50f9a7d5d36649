"""A cache with zarr alone: the accuracy of each teacher, and other blends by arithmetic."""

import numpy as np
import zarr

cache = zarr.open_group("cache/shapes.zarr", mode="r")
labels = cache["test/labels"][:]
teacher = cache["test/teacher_logits"][:].astype(np.float32)
clip = cache.attrs["clip"]["logit_scale"] * cache["test/clip_similarity"][:]

for alpha in (0.0, 0.3, 0.7, 1.0):
    fused = alpha * teacher + (1 - alpha) * clip
    top1 = (fused.argmax(1) == labels).mean()
    print(f"alpha {alpha}: {100 * top1:.2f} % of the test images")
