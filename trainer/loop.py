"""Training, from the first step to the last."""

import contextlib
import os
import platform
import resource
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from data_loaders.faults import Fault, Refusal
from data_loaders.index import Index
from data_loaders.loader import Batch, training_batches
from data_loaders.progress import say
from data_loaders.sampler import scramble
from trainer import checkpoint
from trainer.config import Config
from trainer.context import STOP, Context, Row
from trainer.decision.calibrate import calibrate
from trainer.decision.fits import Temperature
from trainer.decision.ledger import Ledger
from trainer.decision.validation import Validation
from trainer.evaluate import logits_of, tally, view
from trainer.metrics.tally import Shape, Tally, count


def fit(config: Config, context: Context) -> None:
    """Trains from the newest checkpoint, or from the start, and leaves a calibrated model in the run's folder.

    Each worker calls it. A step takes the next `batch` positions of the stream, of which each worker has its share; the
    loss is divided by the whole batch. The only state is the step, the weights, the optimiser and the counts.
    """
    torch.set_num_threads(config.cluster.threads)
    index = config.data.index()
    rows = config.data.training_rows(index)
    sampler = config.data.sampler.over(index, rows, config.seed)
    batch_size, steps = config.data.batch, config.train.total(len(rows), config.data.batch)
    ledger = first_ledger(config, index, sampler.counts(0, steps * batch_size))
    log_prior = torch.from_numpy(np.log(ledger.training_prior)).float().to(context.device)
    shape = Shape(len(index.cell_names), len(index.classes), ledger.abstains)

    model = config.model.build(len(index.classes), config.seed).to(context.device)
    optimizer = config.optimizer.build(model)
    seen = torch.zeros(shape.size, dtype=torch.int64, device=context.device)  # all samples since the start of the run
    identity = identity_of(config, index)
    first = _go_on(identity, context, model, optimizer, seen)
    parallel = DistributedDataParallel(model) if context.workers > 1 else model
    since = torch.zeros_like(seen)  # this worker's samples since the last report
    diverged = torch.zeros(1, dtype=torch.int64, device=context.device)  # steps whose loss was no number
    pace = Pace()

    done = first
    batches = training_batches(
        index, config.data, sampler, config.seed, range(first, steps), context.rank, context.workers
    )
    for step in range(first, steps):
        with pace.waiting():
            images, labels, cells, valid = _to_device(next(batches), context)
        torch.manual_seed(_seed(config.seed, step, context.rank))  # of dropout, so that a resumed step repeats it
        for group in optimizer.param_groups:
            group["lr"] = config.optimizer.rate(step, steps)

        with _autocast(config, context):
            logits = parallel(images).float()
        loss = config.loss(logits, labels, log_prior).sum() * (context.workers / batch_size)  # DDP divides by workers
        loss = loss + config.penalties(model)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

        with torch.no_grad():
            count(since, logits.log_softmax(1), logits.argmax(1), labels, cells, valid, shape)
            diverged += ~loss.isfinite()
        if (step + 1) % config.train.report_every == 0 or step + 1 == steps:
            _refuse_if_diverged(int(context.sum(diverged)), step + 1)
            seen += context.sum(since)
            since.zero_()
            row = {"step": step + 1, "steps": steps, "lr": config.optimizer.rate(step, steps)}
            row |= {"train": Tally.of(seen.cpu().numpy(), shape).pack(), "speed": pace.since_last(step + 1 - first)}
            row |= _validate(config, index, model, ledger, context, shape)
            state = checkpoint.State(step + 1, identity, row)
            path = None
            if context.rank == 0:
                path = checkpoint.save(context.folder, state, model, optimizer, seen, config.train.keep)
            context.report(state.key, row, path)
            done = step + 1
            if done < steps and _is_to_stop(context):
                break
    finish(config, index, model, ledger, context, {"step": done, "steps": steps})


def identity_of(config: Config, index: Index) -> str:
    """Hash of what decides the weights: settings and data."""
    return f"{config.identity}-{index.fingerprint}"


def first_ledger(config: Config, index: Index, drawn: np.ndarray) -> Ledger:
    """The ledger of a run that draws each class so often, [K], before calibration."""
    if not drawn.all():
        faults = [
            Fault("train", f"{index.classes[k]!r} is never drawn in so few steps") for k in np.flatnonzero(drawn == 0)
        ]
        raise Refusal("The run is too short:", faults)
    natural = np.bincount(index.labels[index.rows_of(config.data.train)], minlength=len(index.classes))
    training = drawn / drawn.sum()
    return config.decision.ledger(index.classes, natural / natural.sum(), training, config.loss.logit_prior(training))


def _go_on(identity: str, context: Context, model: nn.Module, optimizer: Optimizer, seen: Tensor) -> int:
    """Loads the newest checkpoint that verifies; the steps that are done."""
    folder, skipped = checkpoint.newest(context.folder)
    if context.rank == 0:
        say(*(f"skipped {line}" for line in skipped))
    if folder is None:
        return 0
    state = checkpoint.restore(folder, identity, model, optimizer, seen)
    if context.rank == 0:
        say(f"going on from step {state.step:,}")
    context.report(state.key, state.report, None)  # the run may have died before it could
    return state.step


def _refuse_if_diverged(losses: int, step: int) -> None:
    """Called before a checkpoint, so that none is ever saved of weights that are no numbers."""
    if losses:
        fix = "lower it, or lengthen optimizer.warmup"
        fault = Fault("optimizer.lr", f"before step {step:,}, {losses:,} times the loss was not a finite number", fix)
        raise Refusal("Training diverged:", [fault], 65)


def _is_to_stop(context: Context) -> bool:
    """Whether somebody asks for it; all workers get the same answer."""
    asked = context.rank == 0 and (context.folder / STOP).exists()
    if asked:
        say(f"stopping, as {context.folder / STOP} asks for; without it the same command goes on")
    return bool(context.sum(torch.tensor([asked], dtype=torch.int64, device=context.device)))


def _validate(config: Config, index: Index, model: nn.Module, ledger: Ledger, context: Context, shape: Shape) -> Row:
    """What the validation split says, on rank 0: the packed tally under the (not yet calibrated) ledger, and the NLL
    that a temperature would bring."""
    rows = index.rows_of(config.data.validation)
    _same_buffers(model, context)
    logits = logits_of(model, index, config.data, rows, context)
    if context.rank:
        return {}
    labels = index.labels[rows]
    seen = tally(view("ledger", ledger, logits), labels, index.cells[rows], shape)
    finite = np.isfinite(logits).all()  # a model that diverges is refused at its next step, by all workers at once
    after = calibrate(ledger, logits, labels, Temperature()).nll_after if finite else np.nan
    return {"validation": seen.pack(), "calibrated_nll": after}


def finish(
    config: Config, index: Index, model: nn.Module, ledger: Ledger, context: Context, facts: dict[str, Any]
) -> None:
    """Calibrates on the validation rows and publishes the model, with what is known of it; every worker calls it."""
    rows = index.rows_of(config.data.validation)
    _same_buffers(model, context)
    logits = logits_of(model, index, config.data, rows, context)
    said = Validation(logits, index.labels[rows], index.cells[rows], rows)
    calibration = calibrate(ledger, said.logits, said.labels, config.calibration, said.cells)
    if context.rank == 0:
        facts |= {
            "data": index.fingerprint,
            "groups": {name: list(values) for name, values in index.group_values.items()},
            "warnings": list(calibration.warnings),
            "validation": {"n": calibration.n, "nll": calibration.nll_before, "nll_calibrated": calibration.nll_after},
            "calibration": calibration.facts(),
            "parameters": sum(p.numel() for p in model.parameters()),
            "machine": {"torch": torch.__version__, "device": str(context.device), "cpu": platform.machine()},
        }
        checkpoint.save_model(context.folder / "model", model, config, calibration.ledger, facts, said)
    context.sum(torch.zeros(1, device=context.device))  # no worker leaves before the model is there


def _same_buffers(model: nn.Module, context: Context) -> None:
    """Gives all workers the running statistics of rank 0, which are the ones that are saved."""
    for buffer in model.buffers() if context.workers > 1 else ():
        buffer.copy_(context.sum(buffer if context.rank == 0 else torch.zeros_like(buffer)))


def _to_device(batch: Batch, context: Context) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images, labels, cells and valid."""
    parts = [torch.from_numpy(part) for part in (batch.images, batch.labels, batch.cells, batch.valid)]
    if context.device.type != "cpu":
        parts = [part.pin_memory().to(context.device, non_blocking=True) for part in parts]
    images, labels, cells, valid = parts
    return images, labels, cells, valid


def _autocast(config: Config, context: Context) -> contextlib.AbstractContextManager[Any]:
    half = context.device.type == "cuda" and torch.cuda.is_bf16_supported()
    if config.train.precision == "bfloat16" or (config.train.precision == "auto" and half):
        return torch.autocast(context.device.type, torch.bfloat16)
    return contextlib.nullcontext()


def _seed(seed: int, step: int, rank: int) -> int:
    """A word that differs for every seed, step and rank."""
    word = np.zeros(1, np.uint64)
    for part in (seed, step, rank):
        word = scramble(word + np.uint64(part) + np.uint64(0x9E3779B97F4A7C15))
    return int(word[0] >> np.uint64(1))


@dataclass
class Pace:
    """Where the time goes."""

    began: float = 0.0
    waited: float = 0.0
    reported: int = 0

    def __post_init__(self) -> None:
        self.began = time.monotonic()

    @contextlib.contextmanager
    def waiting(self):
        """Time in this block is spent waiting for data."""
        began = time.monotonic()
        yield
        self.waited += time.monotonic() - began

    def since_last(self, steps: int) -> dict[str, float]:
        """Seconds a step and the share of them that waited for data, since the last call, after so many steps."""
        passed, done = time.monotonic() - self.began, steps - self.reported
        pace = {"seconds_per_step": passed / max(done, 1), "waiting_for_data": self.waited / max(passed, 1e-9)}
        pace |= {"pid": os.getpid(), "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10}
        if torch.cuda.is_initialized():
            pace["peak_gpu_memory_mib"] = torch.cuda.max_memory_allocated() / 2**20
        self.began, self.waited, self.reported = time.monotonic(), 0.0, steps
        return pace
