"""timm's training step: its network, optimizer, schedule and weight averaging with the KD loss."""

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch.utils.data import DataLoader

import richkd

samples = richkd.torch_dataset("cache/shapes.zarr", view=0, arrays=["teacher_logits"])
student = timm.create_model("mobilenetv3_small_050", num_classes=samples.cache.num_classes)
optimizer = create_optimizer_v2(student, opt="adamw", lr=1e-3, weight_decay=0.05)
scheduler, epochs = create_scheduler_v2(optimizer, sched="cosine", num_epochs=2)
average = ModelEmaV3(student, decay=0.99)

for epoch in range(epochs):
    view = epoch % samples.cache.num_views
    for batch in DataLoader(samples.at_view(view), batch_size=16, shuffle=True, drop_last=True):
        logits = student(batch["image"])
        loss = richkd.losses.kd_loss(logits, batch["teacher_logits"], temperature=4.0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        average.update(student)
    scheduler.step(epoch + 1)
    print(f"epoch {epoch + 1}: loss {loss:.3f}, lr {optimizer.param_groups[0]['lr']:.1e}")
