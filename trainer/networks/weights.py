"""Weights to start from: a model of ours, or a state dict of torchvision or timm, as safetensors or by torch."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from data_loaders.faults import Fault, Refusal
from trainer.networks.classifier import Classifier
from trainer.networks.parts import Head

TITLE = "The weights to start from cannot be used:"
NAMED = 3
"""Tensors of each fault that are named."""


def load(path: Path, model: Classifier, new_head: bool) -> list[str]:
    """Gives a model the weights of a file; lines that say what was not taken from it.

    The head is taken whole or, where another number of classes or of heads is wanted, or a new one, stays as it was
    drawn. All else must fit, or Refusal (65) says what does not.
    """
    given = read(path)
    target = model if "deviation" in given else model.network  # of other people, a file has no normalisation
    name = next(name for name, part in target.named_modules() if isinstance(part, Head))
    if target is model.network:
        given = _with_our_head(given, name)
    own = target.state_dict()
    heads = [{key: tensors[key] for key in tensors if key.startswith(f"{name}.")} for tensors in (own, given)]
    bodies = [{key: tensors[key] for key in tensors if not key.startswith(f"{name}.")} for tensors in (own, given)]
    faults = list(_faults(path, *bodies)) + list(_not_finite(path, given))
    if faults:
        raise Refusal(TITLE, faults, 65)
    fits = not any(_faults(path, *heads))
    target.load_state_dict({**own, **bodies[1], **(heads[1] if fits and not new_head else {})})
    if new_head:
        return ["the head is drawn anew, as model.new_head asks"]
    return [] if fits else [f"the head is drawn anew: {path} has none of as many classes and the same kind"]


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name; Refusal (65) where it holds none, or more than tensors."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tree = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as wrong:  # a damaged file leads torch to errors of a dozen kinds
        fix = "save model.state_dict() alone, by safetensors or torch.save, or fetch the file again"
        fault = Fault(str(path), f"cannot be read as plain tensors: {type(wrong).__name__}", fix)
        raise Refusal(TITLE, [fault], 65) from wrong
    if not isinstance(tree, Mapping) or not all(isinstance(tensor, Tensor) for tensor in tree.values()):
        fault = Fault(str(path), "does not hold tensors by name", "save model.state_dict() alone")
        raise Refusal(TITLE, [fault], 65)
    return {str(name): tensor for name, tensor in tree.items()}


def _with_our_head(given: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The linear layer of that name as the only layer of a head."""
    names = {f"{name}.{part}": f"{name}.layers.0.{part}" for part in ("weight", "bias")}
    return {names.get(key, key): tensor for key, tensor in given.items()}


def _faults(path: Path, own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> Iterator[Fault]:
    """What keeps tensors from being given to a model that has its own."""
    fix = "give weights of the same model, of the same size"
    # Files of before 2018 do not count batches, and nothing reads the counts.
    missing = [key for key in own if key not in given and not key.endswith("num_batches_tracked")]
    if missing:
        yield Fault(str(path), f"lacks {len(missing)} of the {len(own)} tensors of the model: {_some(missing)}", fix)
    unknown = [key for key in given if key not in own]
    if unknown:
        yield Fault(str(path), f"has {len(unknown)} tensors that the model does not have: {_some(unknown)}", fix)
    shapes = [(key, list(given[key].shape), list(own[key].shape)) for key in own if key in given]
    other = [f"{key} {found} instead of {wanted}" for key, found, wanted in shapes if found != wanted]
    if other:
        yield Fault(str(path), f"has {len(other)} tensors of another shape: {_some(other)}", fix)


def _not_finite(path: Path, given: Mapping[str, Tensor]) -> Iterator[Fault]:
    wrong = [key for key, tensor in given.items() if not tensor.isfinite().all()]
    if wrong:
        yield Fault(str(path), f"has numbers that are not finite in {len(wrong)} tensors: {_some(wrong)}", "restore it")


def _some(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (", …" if len(names) > NAMED else "")
