"""Trains a ResNet with Lightning."""

import argparse

import lightning
import torch
from torch.utils.data import DataLoader
from torchvision import models, transforms

from data_loaders.torch import BalancedSampler, ShardDataset

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("data", help="folder of the images")
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--steps", type=int, default=-1, help="of all epochs; -1 is all of them")
parser.add_argument("--batch", type=int, default=64)
parser.add_argument("--size", type=int, default=224)
parser.add_argument("--workers", type=int, default=2)
args = parser.parse_args()


class Classifier(lightning.LightningModule):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.model = models.resnet18(num_classes=classes)

    def training_step(self, batch):
        images, labels = batch
        return torch.nn.functional.cross_entropy(self.model(images), labels)

    def validation_step(self, batch):
        images, labels = batch
        loss = torch.nn.functional.cross_entropy(self.model(images), labels)
        self.log("loss", loss, batch_size=len(labels))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


look = transforms.Compose([transforms.Resize(args.size), transforms.CenterCrop(args.size), transforms.ToTensor()])
train = ShardDataset(args.data, "train", look)
val = ShardDataset(args.data, "val", look)
train_loader = DataLoader(train, args.batch, sampler=BalancedSampler(train), num_workers=args.workers)
val_loader = DataLoader(val, args.batch, num_workers=args.workers)
trainer = lightning.Trainer(
    max_epochs=args.epochs, max_steps=args.steps, logger=False, enable_checkpointing=False, enable_progress_bar=False
)
model = Classifier(len(train.classes))
trainer.fit(model, train_loader, val_loader)
(measured,) = trainer.validate(model, val_loader, verbose=False)
print(f"after {trainer.global_step} steps: loss {measured['loss']:.3f}")
