"""The networks themselves: torch modules from uint8 images to logits."""

from trainer.networks.classifier import IMAGENET_MEAN, IMAGENET_STD, Classifier, Ensemble

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "Classifier", "Ensemble"]
