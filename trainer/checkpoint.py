"""Checkpoints that a run goes on from, and the model that it ends with: safetensors and JSON, hashed, published whole.

A checkpoint is run/checkpoints/step-NNNNNNNNN/{model,optimizer,tally}.safetensors, state.json, MANIFEST.json.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from data_loaders import durable
from data_loaders.faults import Fault, Refusal
from data_loaders.settings import dump, parse
from trainer.config import Config
from trainer.context import Row
from trainer.decision.ledger import Ledger
from trainer.decision.validation import Validation
from trainer.networks import Classifier, Ensemble

VALIDATION = "validation.safetensors"
MOST_LOGITS = 2**26
"""Of validation rows, kept with a model: 256 MiB."""


class State(NamedTuple):
    """What a run goes on with, beside its weights."""

    step: int
    """Steps that are done."""
    identity: str
    """Hash of what decides the weights: settings and data."""
    report: Row
    """What was to be reported of this step: a run that died in between reports it when it goes on."""

    @property
    def key(self) -> str:
        """Names the step, in reports and folders."""
        return f"step-{self.step:09d}"


def save(run: Path, state: State, model: nn.Module, optimizer: Optimizer, seen: Tensor, keep: int) -> Path:
    """Publishes a checkpoint, then removes all but the newest `keep`; its path."""
    folder = run / "checkpoints" / state.key
    tensors, plain = _split(optimizer)
    with durable.publishing(folder) as aside:
        save_file(_on_cpu(model.state_dict()), aside / "model.safetensors")
        save_file(_on_cpu(tensors), aside / "optimizer.safetensors")
        save_file(_on_cpu({"seen": seen}), aside / "tally.safetensors")
        durable.write_json(aside / "state.json", {**state._asdict(), "optimizer": plain})
    for old in _steps(run)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def newest(run: Path) -> tuple[Path, list[str]] | tuple[None, list[str]]:
    """The newest checkpoint that verifies, if there is one, and which were skipped and why."""
    skipped: list[str] = []
    for folder in _steps(run):
        wrong = durable.damage(folder)
        if not wrong:
            return folder, skipped
        skipped.append(f"{folder}: {wrong}")
    return None, skipped


def state_of(folder: Path) -> State:
    """The state of a checkpoint, without its tensors."""
    return _state(json.loads((folder / "state.json").read_bytes()))


def restore(folder: Path, identity: str, model: nn.Module, optimizer: Optimizer, seen: Tensor) -> State:
    """Loads a checkpoint into the model, the optimiser and the counts; refuses one of other settings or data."""
    tree = json.loads((folder / "state.json").read_bytes())
    state = _state(tree)
    if state.identity != identity:
        fix = "give another name=…, or remove the folder to start anew"
        raise Refusal("This run was started with other settings:", [Fault(str(folder), "is a checkpoint of it", fix)])
    model.load_state_dict(load_file(folder / "model.safetensors"))
    optimizer.load_state_dict(_join(load_file(folder / "optimizer.safetensors"), tree["optimizer"]))
    seen.copy_(load_file(folder / "tally.safetensors")["seen"])
    return state


@dataclass(frozen=True)
class Trained:
    """A model with all that is needed to use it."""

    model: Classifier | Ensemble
    config: Config
    ledger: Ledger
    validation: Validation | None = None
    """What it says of the validation rows; None where that was not kept."""


def save_model(
    folder: Path,
    model: nn.Module,
    config: Config,
    ledger: Ledger,
    facts: Mapping[str, Any],
    validation: Validation | None = None,
) -> None:
    """Publishes a trained model: weights, settings (with the preprocessing), ledger, and what it says of the validation
    rows: all, or of 2**26 logits a sample stratified by class."""
    with durable.publishing(folder) as aside:
        save_file(_on_cpu(model.state_dict()), aside / "model.safetensors")
        (aside / "config.yaml").write_text(dump(config))
        durable.write_json(aside / "ledger.json", ledger.to_json())
        durable.write_json(aside / "facts.json", dict(facts))
        if validation is not None:
            save_arrays(_sampled(validation, config.seed)._asdict(), aside / VALIDATION)


def load_model(folder: Path, device: torch.device) -> Trained:
    """The model that `save_model` wrote, ready to evaluate."""
    wrong = durable.damage(folder)
    if wrong:
        raise Refusal("The model cannot be used:", [Fault(str(folder), wrong, "train it first, or restore it")], 65)
    config = parse(Config, [str(folder / "config.yaml")])
    ledger = Ledger.from_json(json.loads((folder / "ledger.json").read_bytes()))
    model = empty(config, len(ledger.classes))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    said = folder / VALIDATION
    validation = Validation(**load_arrays(said)) if said.exists() else None
    return Trained(model.to(device).eval(), config, ledger, validation)


def empty(config: Config, classes: int) -> Classifier | Ensemble:
    """The model of a config before its weights are loaded."""
    if config.train.members == 1:
        return config.model.build(classes, config.seed)
    return Ensemble([config.model.build(classes, member.seed) for member in config.members()], classes)


def _sampled(validation: Validation, seed: int, most: int = MOST_LOGITS) -> Validation:
    """All rows, or about as many of each class as its share of `most` logits, and one at least, in their order."""
    share = most / max(validation.logits.size, 1)
    if share >= 1:
        return validation
    random = np.random.Generator(np.random.Philox(key=[seed, len(validation.labels)]))
    parts = [np.flatnonzero(validation.labels == k) for k in np.unique(validation.labels)]
    kept = np.sort(np.concatenate([random.permutation(part)[: max(int(share * len(part)), 1)] for part in parts]))
    logits, labels, cells, rows = validation
    return Validation(logits[kept], labels[kept], cells[kept], rows[kept])


def _state(tree: dict[str, Any]) -> State:
    return State(tree["step"], tree["identity"], tree["report"])


def _steps(run: Path) -> list[Path]:
    """Checkpoints, newest first."""
    return sorted((run / "checkpoints").glob("step-*"), reverse=True)


def _split(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of an optimiser as named tensors and a JSON tree."""
    state = optimizer.state_dict()
    tensors = {
        f"{p}.{k}": v for p, values in state["state"].items() for k, v in values.items() if isinstance(v, Tensor)
    }
    plain = {
        str(p): {k: v for k, v in values.items() if not isinstance(v, Tensor)} for p, values in state["state"].items()
    }
    return tensors, {"param_groups": state["param_groups"], "state": plain}


def _join(tensors: dict[str, Tensor], tree: dict[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {int(p): dict(values) for p, values in tree["state"].items()}
    for name, tensor in tensors.items():
        parameter, _, key = name.partition(".")
        state[int(parameter)][key] = tensor
    return {"state": state, "param_groups": tree["param_groups"]}


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
