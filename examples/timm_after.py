"""Trains a timm model with timm's own transforms."""

import argparse

import timm
import torch
from timm.data import create_transform, resolve_data_config
from timm.optim import create_optimizer_v2
from torch.utils.data import DataLoader

from data_loaders.torch import BalancedSampler, ShardDataset

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("data", help="folder of the images")
parser.add_argument("--model", default="resnet18")
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--steps", type=int, help="of an epoch; by default all of them")
parser.add_argument("--batch", type=int, default=64)
parser.add_argument("--size", type=int, default=224)
parser.add_argument("--workers", type=int, default=2)
args = parser.parse_args()

train = ShardDataset(args.data, "train")
val = ShardDataset(args.data, "val")
names = train.classes
model = timm.create_model(args.model, num_classes=len(names))
config = resolve_data_config({"img_size": args.size}, model=model)
train.transform = create_transform(**config, is_training=True)
val.transform = create_transform(**config)
train_loader = DataLoader(train, args.batch, sampler=BalancedSampler(train), num_workers=args.workers)
val_loader = DataLoader(val, args.batch, num_workers=args.workers)
optimizer = create_optimizer_v2(model, "adamw", lr=1e-3)

for epoch in range(args.epochs):
    model.train()
    for step, (images, labels) in enumerate(train_loader):
        if step == args.steps:
            break
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    right, rows = [0] * len(names), [0] * len(names)
    with torch.inference_mode():
        for images, labels in val_loader:
            for label, called in zip(labels.tolist(), model(images).argmax(1).tolist(), strict=True):
                right[label] += label == called
                rows[label] += 1
    print(f"epoch {epoch}: recall of " + ", ".join(f"{name} {right[k]}/{rows[k]}" for k, name in enumerate(names)))
