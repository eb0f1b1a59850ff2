"""Training, from the first step to the last."""

import contextlib
import os
import platform
import resource
import time
from bisect import bisect_right
from collections.abc import Generator
from dataclasses import dataclass, field
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data_loaders import durable
from data_loaders.faults import Fault, Refusal
from data_loaders.gpu import decode_into, is_here
from data_loaders.images import CAUSES, decoder_name
from data_loaders.index import Index, Rows
from data_loaders.loader import Batch, Costs, Data, ids_of, refuse_too_many, training_batches
from data_loaders.progress import say
from data_loaders.stream import Sampler
from trainer import checkpoint
from trainer.config import Config
from trainer.context import STOP, Context, Row
from trainer.decision.calibrate import calibrate
from trainer.decision.fits import Temperature
from trainer.decision.ledger import Ledger
from trainer.decision.validation import Validation
from trainer.evaluate import logits_of, tally, view
from trainer.learner import Failure, Learner, word
from trainer.losses import Known
from trainer.metrics.tally import Shape, Tally, count
from trainer.mixing import Images

NO_IMAGES = np.zeros((0, 3, 0, 0), np.uint8)
MOST_NAMED = 10
"""Images that a message names."""
LOWER = "lower it, lengthen optimizer.warmup or set optimizer.clip"
LEAST_DRAWN = 0.5
"""Of a class in a phase of the sampler in which it is not drawn, where others follow."""
PARTNERS = 1
"""Sets the stream of images that are mixed in apart from the one that they are mixed into."""


def fit(config: Config, context: Context) -> None:
    """Trains from the newest checkpoint, or from the start, and leaves a calibrated model in the run's folder.

    Each worker calls it. A step takes the next `batch` positions of the stream, of which each worker has its share; the
    loss is divided by the weights of the whole batch. All that a run goes on with is in its checkpoint.
    """
    torch.set_num_threads(config.cluster.threads)
    index = config.data.index()
    rows = config.data.training_rows(index)
    steps = config.train.total(len(rows), config.data.batch)
    stream = config.data.sampler.over(index, rows, config.seed, steps * config.data.batch)
    known = knowledge(config, index, rows, stream, steps)
    final = ledger_after(steps, steps, config, index, known)
    shape = Shape(len(index.cell_names), len(index.classes), final.abstains)

    learner = Learner(config, context, len(index.classes), known, steps)
    seen = torch.zeros(shape.size, dtype=torch.int64, device=context.device)  # all samples since the start of the run
    since = torch.zeros_like(seen)  # this worker's samples since `seen` was brought up to date
    skipped = torch.zeros(shape.groups, shape.classes, dtype=torch.int64)  # draws of damaged rows since the start
    skips = torch.zeros_like(skipped)  # this worker's, since `skipped` was brought up to date
    identity = identity_of(config, index)
    machine = machine_of(config, context)
    pace = Pace()
    first, best = _go_on(identity, context, learner, seen, skipped, pace.costs, machine)

    def state(report: Row | None) -> checkpoint.State:
        """Of a checkpoint to be: adds to `seen` what all workers have seen since. None is ever made of no numbers."""
        if not learner.is_finite():
            what = f"after step {done:,} the weights are not finite numbers"
            raise Refusal("Training diverged:", [Fault("optimizer.lr", what, LOWER)], 65)
        seen.add_(context.sum(since))
        since.zero_()
        index.check(wait=True)
        skipped.add_(context.sum(skips.to(context.device)).cpu())
        skips.zero_()
        pace.costs.damaged |= _damaged_anywhere(pace.costs.damaged, context)
        refuse_too_many(index, config.data, len(pace.costs.damaged))
        return checkpoint.State(done, identity, report, best, machine)

    def save(given: checkpoint.State) -> None:
        if context.rank == 0:
            files, plain = learner.learned()
            damaged = torch.tensor(sorted(pace.costs.damaged), dtype=torch.int64)
            writer.save(
                given,
                checkpoint.Learned({**files, "tally": {"seen": seen, "skipped": skipped, "damaged": damaged}}, plain),
            )

    done, over = first, _is_spent(config, first, best)
    with (
        contextlib.closing(checkpoint.Writer(context.folder, config.train.keep)) as writer,
        contextlib.closing(
            _batches(config, index, rows, stream, range(first, steps), learner, context, pace.costs)
        ) as batches,
    ):
        while done < steps and not over:
            context.progress(done, "loading data")
            with pace.waiting():
                batch, partners, replaced = next(batches)
            context.progress(done, "computing")
            outcome = learner.step(batch, partners, done)
            with torch.no_grad():
                z, labels, cells = outcome
                valid = torch.ones_like(labels, dtype=torch.bool)
                count(since, z.log_softmax(1), z.argmax(1), labels, cells, valid, shape)
            skips.index_put_(replaced, torch.ones(len(replaced[0]), dtype=torch.int64), accumulate=True)
            done += 1

            is_due = done % config.train.report_every == 0 or done == steps
            asked = context.ask_to_stop()
            if failure := learner.failure(0) if is_due or asked != "go_on" else learner.failure():
                raise _diverged(config, index, stream, learner, context, failure)
            if is_due:
                row = {"step": done, "steps": steps, "lr": config.optimizer.rate(done - 1, steps)}
                given = state(None)
                row |= {"train": Tally.of(seen.cpu().numpy(), shape).pack(), "speed": pace.since_last(done - first)}
                row["skipped"] = [[*at, int(skipped[*at])] for at in skipped.nonzero().tolist()]
                ledger = ledger_after(done, steps, config, index, known)
                row |= _validate(config, index, learner.judged, ledger, context, shape)
                best = _better(config, context, best, done, row)
                save(given._replace(report=row, best=best))
                context.report(given.key, row, writer.published)
                over = _is_spent(config, done, best) or (done < steps and _is_to_stop(context))
            elif asked != "go_on":
                save(state(None))
            if asked == "stop" and done < steps and not over:
                writer.wait()
                _together(context)
                fault = Fault(
                    str(context.folder), f"stopped after step {done:,} of {steps:,}", "the same command goes on"
                )
                raise Refusal("The run was interrupted:", [fault], 75)
        writer.wait()
        _together(context)
        if best:
            _take_back(context, learner, best)
    kept, spent = best.step if best else done, _is_spent(config, done, best)
    facts = {"step": done, "steps": steps, "kept_step": kept, "stopped_early": spent}
    ledger = ledger_after(kept, steps, config, index, known)
    finish(config, index, learner.judged, ledger, context, facts)


def identity_of(config: Config, index: Index) -> str:
    """Hash of what decides the weights: settings, data, and those that it starts from."""
    return "-".join(filter(None, (config.identity, index.fingerprint, config.model.start_hash())))


def knowledge(config: Config, index: Index, rows: Rows, stream: Sampler, steps: int) -> list[tuple[int, Known]]:
    """What the loss knows of the data from a position of the stream on, for each of its phases."""
    end = steps * config.data.batch
    sizes = index.cell_sizes(rows)
    starts = [start for start in stream.phases if start < end]
    spans = list(pairwise([*starts, end]))
    drawn = np.array([stream.counts(*span) for span in spans], np.float64)
    if never := np.flatnonzero(drawn[-1] == 0).tolist():
        faults = [Fault("train", f"{index.classes[k]!r} is never drawn in so few steps") for k in never]
        raise Refusal("The run is too short:", faults)
    drawn = np.maximum(drawn, LEAST_DRAWN)
    if config.mixing.partners is not None:  # whose labels count by their share of the images
        partners, own = partner_stream(config, index, rows, end), config.mixing.own_share
        drawn = own * drawn + (1 - own) * np.array([partners.counts(*span) for span in spans])
    priors = drawn / drawn.sum(1, keepdims=True)
    return [(start, Known(sizes, prior, config.model.scale)) for start, prior in zip(starts, priors, strict=True)]


def partner_stream(config: Config, index: Index, rows: Rows, positions: int) -> Sampler:
    """Of the images that are mixed in, where these have a stream of their own."""
    assert config.mixing.partners is not None
    return config.mixing.partners.over(index, rows, word(config.seed, PARTNERS), positions)


def ledger_after(step: int, steps: int, config: Config, index: Index, known: list[tuple[int, Known]]) -> Ledger:
    """The ledger, before calibration, of a model after so many of all steps: its logits are conditioned on what the
    sampler and the loss do in the phase at hand."""
    last = known[bisect_right([start for start, _ in known], (step - 1) * config.data.batch) - 1][1]
    natural = index.class_sizes(index.whole(config.data.train))
    conditioned = config.loss.logit_prior(last.prior, last, (step - 1) / steps)
    return config.decision.ledger(index.classes, natural / natural.sum(), last.prior, conditioned)


def _go_on(
    identity: str,
    context: Context,
    learner: Learner,
    seen: Tensor,
    skipped: Tensor,
    costs: Costs,
    machine: dict[str, str | int],
) -> tuple[int, checkpoint.Best | None]:
    """Loads the newest checkpoint that verifies: the steps that are done, and the best of them."""
    folder = _agreed(context)
    if folder is None:
        said = learner.start()
        say(*(said if context.rank == 0 else ()))
        return 0, None
    state, learned = checkpoint.load(folder)
    if state.identity != identity:
        fix = "give another name=…, or remove the folder to start anew"
        raise Refusal("This run was started with other settings:", [Fault(str(folder), "is a checkpoint of it", fix)])
    learner.load(learned)
    seen.copy_(learned.tensors["tally"]["seen"])
    skipped.copy_(learned.tensors["tally"]["skipped"])
    costs.damaged.update(learned.tensors["tally"]["damaged"].tolist())
    if context.rank == 0:
        say(f"going on from step {state.step:,}")
        former = state.machine or {}
        other = [
            f"{name} {value}, not {former.get(name)}" for name, value in machine.items() if former.get(name) != value
        ]
        say(*(f"the same images, but other roundings: {text}" for text in other))
    if state.report is not None:
        context.report(state.key, state.report, None)  # the run may have died before it could
    return state.step, state.best


def _agreed(context: Context) -> Path | None:
    """The newest checkpoint that verifies, as rank 0 finds it; all others must see that very one."""
    step = -1
    if context.rank == 0:
        found, skipped = checkpoint.newest(context.folder)
        say(*(f"skipped {line}" for line in skipped))
        step = checkpoint.state_of(found).step if found else -1
    step = int(context.sum(torch.tensor([step + 1 if context.rank == 0 else 0], device=context.device))) - 1
    if step < 0:
        return None
    folder = context.folder / "checkpoints" / checkpoint.key_of(step)
    wrong = durable.damage(folder) if context.rank else None
    if context.sum(torch.tensor([wrong is not None], dtype=torch.int64, device=context.device)):
        what = wrong or "another worker cannot read it"
        raise Refusal("The workers do not see the same files:", [Fault(str(folder), what, "try again")], 75)
    return folder


def machine_of(config: Config, context: Context) -> dict[str, str | int]:
    """What the roundings depend on, beside settings and data."""
    device = context.device
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    found: dict[str, str | int] = {"torch": torch.__version__, "device": kind}
    if device.type == "cpu":
        found["threads"] = torch.get_num_threads()
    is_there = config.data.decoder == "gpu" and is_here(device)
    found["decoder"] = "nvJPEG" if is_there else decoder_name(config.data.decoder)
    return found if config.train.reproducible else found | {"workers": context.workers}


def _batches(
    config: Config,
    index: Index,
    rows: Rows,
    stream: Sampler,
    steps: range,
    learner: Learner,
    context: Context,
    costs: Costs,
) -> Generator[tuple[Images, Images | None, tuple[Tensor, Tensor]]]:
    """This worker's part of the batch of every step, on the device, and of the images that are mixed into it; and cell
    and class of each of them that is in the place of a damaged row."""
    places = range(learner.places[0].start, learner.places[-1].stop)

    is_gpu = context.device.type == "cuda"
    data = _decodable(config.data, context)

    def on_device(sampler: Sampler, seed: int) -> Generator[tuple[Images, Batch]]:
        batches = training_batches(
            index, data, sampler, seed, steps, places, costs=costs, alters=not is_gpu, pinned=is_gpu
        )
        return _ahead(batches, data, index, seed, context.device)

    if config.mixing.partners is not None:  # two streams share the memory
        data = data.model_copy(update={"memory": max(data.memory // 2, 1)})
    own = on_device(stream, config.seed)
    if config.mixing.partners is None:
        with contextlib.closing(own):
            yield from ((images, None, _replaced(batch)) for images, batch in own)
        return
    partners = on_device(
        partner_stream(config, index, rows, steps.stop * config.data.batch), word(config.seed, PARTNERS)
    )
    with contextlib.closing(own), contextlib.closing(partners):
        for (images, batch), (others, another) in zip(own, partners, strict=True):
            yield images, others, _replaced(batch, another)


def _replaced(*batches: Batch) -> tuple[Tensor, Tensor]:
    """Cell and class of each place that another row took."""
    cells = np.concatenate([batch.cells[batch.replaced] for batch in batches])
    labels = np.concatenate([batch.labels[batch.replaced] for batch in batches])
    return torch.from_numpy(cells), torch.from_numpy(labels)


def _damaged_anywhere(rows: set[int], context: Context) -> set[int]:
    """The damaged rows that any worker knows of; all call it."""
    counts = torch.zeros(context.workers, dtype=torch.int64, device=context.device)
    counts[context.rank] = len(rows)
    counts = context.sum(counts).tolist()
    if not any(counts):
        return set()
    known = torch.zeros(sum(counts), dtype=torch.int64, device=context.device)
    known[sum(counts[: context.rank]) :][: len(rows)] = torch.tensor(sorted(rows), device=context.device)
    return set(context.sum(known).tolist())


def _decodable(data: Data, context: Context) -> Data:
    """With the host's decoder where no GPU is that has one."""
    if data.decoder != "gpu" or is_here(context.device):
        return data
    if context.rank == 0:
        say(f"data.decoder=gpu: nvJPEG is not here, so {decoder_name('auto')} decodes")
    return data.model_copy(update={"decoder": "auto"})


def _ahead(
    batches: Generator[Batch], data: Data, index: Index, seed: int, device: torch.device
) -> Generator[tuple[Images, Batch]]:
    """Batches on the device, each beside what it was on the host; a GPU gets the next one on a stream of its own, while
    it computes, and alters its pixels there."""
    with contextlib.closing(batches):
        if device.type != "cuda":
            yield from ((_images(batch), batch) for batch in batches)
            return
        side, ahead, arrived = torch.cuda.Stream(device), None, torch.cuda.Event()
        for batch in chain(batches, [None]):
            coming, pinned = None, ()
            if batch is not None:
                pinned = [part if part.is_pinned() else part.pin_memory() for part in _images(batch)]
                with torch.cuda.stream(side):
                    images = Images(*(part.to(device, non_blocking=True) for part in pinned))
                    if batch.encoded:
                        decode_into(images.images, batch.encoded, index)
                    if data.augmentation.alters:
                        altered = data.augmentation.alter(images.images, seed, batch.positions)
                        images = images._replace(images=altered)
                coming = images, batch._replace(images=NO_IMAGES, encoded=None)  # the memory is to be used again
            if ahead is not None:
                torch.cuda.current_stream(device).wait_event(arrived)
                for part in ahead[0]:
                    part.record_stream(torch.cuda.current_stream(device))
                yield ahead
            ahead, arrived = coming, side.record_event()
            if pinned:
                arrived.synchronize()  # before the loader fills that memory again; the step computes meanwhile


def _images(batch: Batch) -> Images:
    return Images(*(torch.from_numpy(part) for part in (batch.images, batch.labels, batch.cells)))


def _diverged(
    config: Config, index: Index, stream: Sampler, learner: Learner, context: Context, failure: Failure
) -> Refusal:
    """Names the images of the batch whose loss is no number. Every worker calls it."""
    wrong = torch.zeros(config.data.batch, dtype=torch.int64, device=context.device)
    wrong[learner.places[0].start : learner.places[-1].stop] = ~failure.losses.isfinite()
    places = np.flatnonzero(context.sum(wrong).cpu().numpy())
    what = "the loss of these images is" if len(places) else "each loss is finite, but the gradient of their sum is"
    places = places if len(places) else np.arange(config.data.batch)
    rows = stream.rows(failure.step * config.data.batch + places[:MOST_NAMED])
    names = ", ".join(f"{row} ({name})" for row, name in zip(rows, ids_of(index, rows).to_pylist(), strict=True))
    more = f" and {len(places) - MOST_NAMED:,} more" if len(places) > MOST_NAMED else ""
    said = f"in step {failure.step + 1:,}, {what} not a finite number: rows {names}{more}"
    return Refusal("Training diverged:", [Fault("optimizer.lr", said, f"{LOWER}; look at the images")], 65)


def _is_to_stop(context: Context) -> bool:
    """Whether somebody asks for it; all workers get the same answer."""
    asked = context.rank == 0 and (context.folder / STOP).exists()
    if asked:
        say(f"stopping, as {context.folder / STOP} asks for; without it the same command goes on")
    return bool(context.sum(torch.tensor([asked], dtype=torch.int64, device=context.device)))


def _better(
    config: Config, context: Context, best: checkpoint.Best | None, step: int, row: Row
) -> checkpoint.Best | None:
    """The best report until now, by the NLL after temperature scaling that rank 0 knows; None without `patience`."""
    if config.train.patience is None:
        return None
    mine = torch.tensor([row.get("calibrated_nll", 0.0)], dtype=torch.float64, device=context.device)
    score = float(context.sum(mine))
    return checkpoint.Best(step, score) if best is None or score < best.score else best


def _is_spent(config: Config, step: int, best: checkpoint.Best | None) -> bool:
    """Whether the patience is."""
    reports = 0 if best is None else (step - best.step) / config.train.report_every
    return reports >= (config.train.patience or np.inf)


def _take_back(context: Context, learner: Learner, best: checkpoint.Best) -> None:
    """Loads the weights of the best report, whose checkpoint is kept."""
    folder = context.folder / "checkpoints" / checkpoint.key_of(best.step)
    if wrong := durable.damage(folder):
        fix = "remove the run's folder and start anew"
        raise Refusal("The best weights are lost:", [Fault(str(folder), wrong, fix)], 65)
    learner.load(checkpoint.load(folder)[1])


def _together(context: Context) -> None:
    """Every worker waits here for the others."""
    context.sum(torch.zeros(1, device=context.device))


def _validate(config: Config, index: Index, model: nn.Module, ledger: Ledger, context: Context, shape: Shape) -> Row:
    """What the validation split says, on rank 0: the packed tally under the (not yet calibrated) ledger, and the NLL
    that a temperature would bring."""
    rows = index.rows_of(config.data.validation)
    _same_buffers(model, context)
    logits = logits_of(model, index, config.data, rows, context)
    if not np.isfinite(logits).all():  # which every worker has
        what = f"{np.sum(~np.isfinite(logits).all(1)):,} validation images have logits that are not finite numbers"
        raise Refusal("Training diverged:", [Fault("optimizer.lr", what, LOWER)], 65)
    if context.rank:
        return {}
    labels = index.labels_of(rows)
    seen = tally(view("ledger", ledger, logits), labels, index.cells_of(rows), shape)
    after = calibrate(ledger, logits, labels, Temperature()).nll_after
    return {"validation": seen.pack(), "calibrated_nll": after}


def finish(
    config: Config, index: Index, model: nn.Module, ledger: Ledger, context: Context, facts: dict[str, Any]
) -> None:
    """Calibrates on the validation rows and publishes the model, with what is known of it; every worker calls it."""
    rows = index.rows_of(config.data.validation)
    _same_buffers(model, context)
    logits = logits_of(model, index, config.data, rows, context)
    said = Validation(logits, index.labels_of(rows), index.cells_of(rows), rows)
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


@dataclass
class Pace:
    """Where the time goes."""

    began: float = 0.0
    waited: float = 0.0
    reported: int = 0
    costs: Costs = field(default_factory=Costs)

    def __post_init__(self) -> None:
        self.began = time.monotonic()

    @contextlib.contextmanager
    def waiting(self):
        """Time in this block is spent waiting for data."""
        began = time.monotonic()
        yield
        self.waited += time.monotonic() - began

    def since_last(self, steps: int) -> dict[str, float]:
        """Seconds a step and the share of them that waited for data, by what kept the data back, since the last call,
        after so many steps. What the loader did not take was the way to the device."""
        passed, done = max(time.monotonic() - self.began, 1e-9), steps - self.reported
        pace = {"seconds_per_step": passed / max(done, 1), "data_wait": self.waited / passed}
        pace |= {f"data_wait_{name}": s / passed for name, s in zip(CAUSES, self.costs.waited.tolist(), strict=True)}
        pace["data_wait_copy"] = max(self.waited - float(self.costs.waited.sum()), 0.0) / passed
        self.costs.waited[:] = 0
        pace |= {"pid": os.getpid(), "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10}
        if torch.cuda.is_initialized():
            pace["peak_gpu_memory_mib"] = torch.cuda.max_memory_allocated() / 2**20
        self.began, self.waited, self.reported = time.monotonic(), 0.0, steps
        return pace
