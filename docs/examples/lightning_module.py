"""PyTorch Lightning: a module of your own, and another view of every sample in each epoch."""

import lightning
import torch
from torch.utils.data import DataLoader

import richkd


class Student(lightning.LightningModule):
    def __init__(self, cache):
        super().__init__()
        self.samples = richkd.torch_dataset(cache, view=0, arrays=["fused_logits"])
        self.network = richkd.create_model("resnet8", cache.num_classes)

    def train_dataloader(self):
        view = self.current_epoch % self.samples.cache.num_views
        return DataLoader(self.samples.at_view(view), batch_size=64, shuffle=True)

    def training_step(self, batch, _):
        logits = self.network(batch["image"])
        return richkd.losses.kd_loss(logits, batch["fused_logits"], temperature=3.0)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


student = Student(richkd.open_cache("cache/shapes.zarr"))
trainer = lightning.Trainer(
    max_epochs=2, reload_dataloaders_every_n_epochs=1, logger=False, enable_checkpointing=False
)
trainer.fit(student)
