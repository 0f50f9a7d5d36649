"""The store with zarr alone: accuracy of each teacher, and another blend by arithmetic."""

import numpy as np
import zarr

store = zarr.open_group("cache/shapes.zarr", mode="r")
labels = store["test/labels"][:]
teacher = store["test/teacher_logits"][:].astype(np.float32)
clip = store.attrs["clip"]["logit_scale"] * store["test/clip_similarity"][:]

for alpha in (0.0, 0.3, 0.7, 1.0):
    fused = alpha * teacher + (1 - alpha) * clip
    top1 = (fused.argmax(1) == labels).mean()
    print(f"alpha {alpha}: {100 * top1:.2f} % of the test images")
