"""Trains a ResNet on a folder of images, as torchvision's reference script does."""

import argparse

import torch
from torch.utils.data import DataLoader
from torchvision import models, transforms

from data_loaders.torch import BalancedSampler, ShardDataset

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("data", help="folder of the images")
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--steps", type=int, help="of an epoch; by default all of them")
parser.add_argument("--batch", type=int, default=64)
parser.add_argument("--size", type=int, default=224)
parser.add_argument("--workers", type=int, default=2)
args = parser.parse_args()

learn = transforms.Compose([transforms.RandomResizedCrop(args.size), transforms.ToTensor()])
look = transforms.Compose([transforms.Resize(args.size), transforms.CenterCrop(args.size), transforms.ToTensor()])
train = ShardDataset(args.data, "train", learn)
val = ShardDataset(args.data, "val", look)
train_loader = DataLoader(train, args.batch, sampler=BalancedSampler(train), num_workers=args.workers)
val_loader = DataLoader(val, args.batch, num_workers=args.workers)
model = models.resnet18(num_classes=len(train.classes))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

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
    right = [0] * len(train.classes)
    with torch.inference_mode():
        for images, labels in val_loader:
            for label, called in zip(labels.tolist(), model(images).argmax(1).tolist(), strict=True):
                right[label] += label == called
    recalls = [f"{name} {right[k]}/{val.targets.count(k)}" for name, k in val.class_to_idx.items()]
    print(f"epoch {epoch}: recall of {', '.join(recalls)}")
