"""A plain PyTorch loop: KD from the fused logits, one view of every sample per epoch."""

import torch
from torch.utils.data import DataLoader

import richkd

cache = richkd.open_cache("cache/shapes.zarr")
samples = richkd.torch_dataset(cache, view=0, arrays=["fused_logits"])
student = richkd.create_model("resnet8", cache.num_classes)
optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)

for epoch in range(3):
    loader = DataLoader(samples.at_view(epoch % cache.num_views), batch_size=64, shuffle=True)
    for batch in loader:
        logits = student(batch["image"])
        loss = torch.nn.functional.cross_entropy(logits, batch["label"])
        loss = loss + 3 * richkd.losses.kd_loss(logits, batch["fused_logits"], temperature=3.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch + 1}: loss {loss:.3f}")
