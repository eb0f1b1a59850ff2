"""Checkpoints that a run goes on from, and the model that it ends with: safetensors and JSON, hashed, published whole.

A checkpoint is run/checkpoints/step-NNNNNNNNN/{model,optimizer,…}.safetensors, state.json, MANIFEST.json. A thread
writes it, from a copy, while training goes on.
"""

import json
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
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


class Best(NamedTuple):
    """Of early stopping."""

    step: int
    score: float


class State(NamedTuple):
    """What a run goes on with, beside its tensors."""

    step: int
    """Steps that are done."""
    identity: str
    """Hash of what decides the weights: settings and data."""
    report: Row | None = None
    """What was to be reported of this step: a run that died in between reports it when it goes on. None between two
    reports."""
    best: Best | None = None
    """The best report until here, where training may stop early."""
    machine: dict[str, str | int] | None = None
    """What the bits of the weights depend on beside settings and data."""

    @property
    def key(self) -> str:
        """Names the step, in reports and folders."""
        return key_of(self.step)


def key_of(step: int) -> str:
    return f"step-{step:09d}"


class Learned(NamedTuple):
    """All tensors of a run, file by file, and what of it is plain numbers."""

    tensors: Mapping[str, Mapping[str, Tensor]]
    plain: dict[str, Any]


class Writer:
    """Publishes the checkpoints of a run, one at a time, in a thread of its own."""

    def __init__(self, run: Path, keep: int) -> None:
        self.run, self.keep = run, keep
        self.published: Path | None = None
        """The newest one, once it is whole and on the disk."""
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    def save(self, state: State, learned: Learned) -> None:
        """Takes a copy, and returns; waits for the checkpoint before, and raises what went wrong with it."""
        self.wait()
        copies, ready = _copied(learned.tensors)
        self._writing = self._thread.submit(self._publish, state, copies, ready, learned.plain)

    def wait(self) -> None:
        """Until all that was saved is published. Raises what kept it from being so: OSError, or Refusal (74) where the
        disk is full."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _publish(self, state: State, tensors: Mapping[str, Mapping[str, Tensor]], ready: Any, plain: Any) -> None:
        if ready is not None:
            ready.synchronize()
        self.published = publish(self.run, state, Learned(tensors, plain))
        kept = {key_of(state.best.step)} if state.best else set()
        before = [folder for folder in _steps(self.run) if folder.name <= state.key]  # newer ones were damaged
        for old in [folder for folder in before[self.keep :] if folder.name not in kept]:
            durable.remove(old)


def publish(run: Path, state: State, learned: Learned) -> Path:
    """Writes a checkpoint; its path."""
    folder = run / "checkpoints" / state.key
    needed = sum(t.nbytes for part in learned.tensors.values() for t in part.values())
    with durable.publishing(folder, needed) as aside:
        for name, part in learned.tensors.items():
            save_file(dict(part), aside / f"{name}.safetensors")
        durable.write_json(aside / "state.json", {**state._asdict(), "plain": learned.plain})
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
    return _read(folder)[0]


def load(folder: Path) -> tuple[State, Learned]:
    """A checkpoint that verified."""
    state, plain = _read(folder)
    return state, Learned({path.stem: load_file(path) for path in sorted(folder.glob("*.safetensors"))}, plain)


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


def _read(folder: Path) -> tuple[State, dict[str, Any]]:
    tree = json.loads((folder / "state.json").read_bytes())
    plain = tree.pop("plain")
    return State(**tree | {"best": Best(*tree["best"]) if tree["best"] else None}), plain


def _steps(run: Path) -> list[Path]:
    """Checkpoints, newest first."""
    return sorted((run / "checkpoints").glob("step-*"), reverse=True)


def optimizer_state(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of an optimiser as named tensors and a JSON tree."""
    state = optimizer.state_dict()
    tensors = {
        f"{p}.{k}": v for p, values in state["state"].items() for k, v in values.items() if isinstance(v, Tensor)
    }
    plain = {
        str(p): {k: v for k, v in values.items() if not isinstance(v, Tensor)} for p, values in state["state"].items()
    }
    return tensors, {"param_groups": state["param_groups"], "state": plain}


@torch.no_grad()
def load_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor], tree: Mapping[str, Any]) -> None:
    """What `optimizer_state` gave."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Any]] = {int(p): dict(values) for p, values in tree["state"].items()}
    for name, tensor in tensors.items():
        number, _, key = name.partition(".")
        like = parameters[int(number)]
        whole = tensor.shape == like.shape  # laid out as the weights are: a fused optimiser takes that for granted
        state[int(number)][key] = torch.empty_like(like).copy_(tensor) if whole else tensor
    optimizer.load_state_dict({"state": state, "param_groups": tree["param_groups"]})


def _copied(tensors: Mapping[str, Mapping[str, Tensor]]) -> tuple[dict[str, dict[str, Tensor]], Any]:
    """Copies on the host, and, where they come from a GPU, the event after which they are whole: nobody waits here."""
    out = {file: {name: _copy(tensor) for name, tensor in part.items()} for file, part in tensors.items()}
    if not any(t.is_cuda for part in tensors.values() for t in part.values()):
        return out, None
    ready = torch.cuda.Event()
    ready.record()
    return out, ready


def _copy(tensor: Tensor) -> Tensor:
    if not tensor.is_cuda:
        return tensor.detach().clone(memory_format=torch.contiguous_format)
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor.detach(), non_blocking=True)


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
