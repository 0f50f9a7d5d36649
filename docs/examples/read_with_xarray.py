"""A cache with xarray alone: arrays have named dimensions and are read when they are used."""

import xarray

train = xarray.open_zarr("cache/shapes.zarr", group="train", consolidated=False, chunks=None)
print(train.sizes)  # sample, view, class, …

logits = train["teacher_logits"].isel(view=0).astype("float32")
right = logits.argmax("class") == train["labels"]
print(f"{100 * float(right.mean()):.2f} % of view 0 are classified right")

spread = train["teacher_logits"].astype("float32").std("view").mean()
print(f"logits of one sample differ by {float(spread):.2f} from view to view")
