"""What one step of training does to the weights, and all that the next one goes on with."""

import contextlib
import os
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from data_loaders.faults import Fault, Refusal
from data_loaders.loader import cuts
from data_loaders.progress import say
from data_loaders.stream import scramble
from trainer.checkpoint import Learned, load_optimizer, optimizer_state
from trainer.config import Config
from trainer.context import Context
from trainer.gradients import Gradients, Plain, Reproducible, part_of
from trainer.losses import Criterion, Known, Weighted
from trainer.mixing import Images
from trainer.networks import Classifier

LAG = 2
"""Steps after which a GPU is asked whether a step went wrong. It is through with it by then, so nobody waits; it has
left the weights as they were before."""


class Outcome(NamedTuple):
    """Of a step, on this worker."""

    logits: Tensor
    """[B, K] float32, in the mean over several heads."""
    labels: Tensor
    """[B], of a mixed image that of the larger share."""
    cells: Tensor


class Failure(NamedTuple):
    """A step after which the gradient was not finite; the weights are those before it."""

    step: int
    losses: Tensor
    """[B], of this worker's images."""


class Part(NamedTuple):
    """A micro-batch of B images with T labels each: 1, or 2 where images are mixed."""

    images: Tensor
    labels: Tensor
    """[T * B]"""
    cells: Tensor
    """[T * B]"""
    shares: Tensor | None
    """[T * B], of each label; None for 1."""


class Learner:
    """The model, and what learns beside it."""

    def __init__(
        self, config: Config, context: Context, classes: int, known: Sequence[tuple[int, Known]], steps: int
    ) -> None:
        """`known` is what the loss knows of the data from a position of the stream on, phase by phase."""
        self.config, self.context, self.steps = config, context, steps
        self.micro_batches = check_workers(config, context.workers, context.device)
        if config.train.reproducible and context.device.type == "cuda":
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, cuBLAS is not deterministic
            torch.use_deterministic_algorithms(True, warn_only=True)
        self.model: nn.Module = config.model.build(classes, config.seed).to(context.device)
        if config.train.sync_batch_norm and context.workers > 1:
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.optimizer = config.optimizer.build(self.model)
        self.average: nn.Module | None = deepcopy(self.model).eval() if config.train.average else None
        self.scaler = torch.amp.GradScaler(context.device.type, enabled=config.train.precision == "float16")
        self.phases = [position for position, _ in known]
        self.criteria: list[Criterion] = [config.loss.bind(phase, context.device) for _, phase in known]
        self.state = self.criteria[0].state  # of the loss
        self.gradients: Gradients = self._gradients()
        self._undecided: deque[tuple[Failure, Tensor, Any]] = deque()

    def _gradients(self) -> Gradients:
        if self.config.train.reproducible:
            return Reproducible(self.model, self.context, self.micro_batches)
        size, part = self.config.data.size, len(cuts(self.config.data.batch, self.micro_batches)[0])
        sample = torch.zeros(part, 3, size, size, dtype=torch.uint8, device=self.context.device)
        return Plain(compiled(self.model, sample) if self.config.train.compile else self.model, self.context)

    @property
    def judged(self) -> nn.Module:
        """The model that is validated and kept."""
        return self.average or self.model

    @property
    def places(self) -> list[range]:
        """Of the batch, this worker's micro-batches."""
        parts = part_of(self.micro_batches, self.context.rank, self.context.workers)
        return cuts(self.config.data.batch, self.micro_batches)[parts.start : parts.stop]

    def step(self, batch: Images, partners: Images | None, step: int) -> Outcome:
        """Takes one step with this worker's part of a batch, and with images to mix into it."""
        criterion = self.criteria[bisect_right(self.phases, step * self.config.data.batch) - 1]
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.optimizer.rate(step, self.steps)
        self.optimizer.zero_grad(set_to_none=True)

        parts = list(self._parts(batch, partners, step))
        logits = (self._forward(part, step, number) for number, part in enumerate(parts))
        losses = ((z, self._losses(criterion, z, part)) for z, part in zip(logits, parts, strict=True))
        if self.config.loss.adaptive:  # its weights follow from all losses, so that all are needed first
            losses = list(losses)
            weights, total = self._adapted(criterion, [loss for _, loss in losses], parts), 1.0
        else:
            weights, total = self._weights(criterion, parts, step)
        done: list[tuple[Tensor, Tensor]] = []
        for (z, loss), weight in zip(losses, weights, strict=True):
            value = (loss if weight is None else loss * weight).sum() / total
            self.gradients.backward(self.scaler.scale(value))
            done.append((z.detach(), loss.detach()))
        self.gradients.finish()
        self._update(Failure(step, torch.cat([loss[: len(z)] for z, loss in done])))
        return Outcome(
            torch.cat([_mean_over_heads(z) for z, _ in done]),
            torch.cat([_foremost(part.labels, part) for part in parts]),
            torch.cat([_foremost(part.cells, part) for part in parts]),
        )

    def failure(self, lag: int = LAG) -> Failure | None:
        """The first step that went wrong, of those that are so many steps back."""
        while len(self._undecided) > (lag if self.context.device.type == "cuda" else 0):
            failure, wrong, ready = self._undecided.popleft()
            if ready is not None:
                ready.synchronize()
            if wrong:
                return failure
        return None

    def is_finite(self) -> bool:
        """Whether all weights and statistics are numbers, on every worker; each of them calls it."""
        real = [t for t in chain(self.model.parameters(), self.model.buffers()) if t.is_floating_point()]
        wrong = (~get_total_norm([t.detach() for t in real]).isfinite()).to(torch.int64)
        return not self.context.sum(wrong)

    def start(self) -> list[str]:
        """Takes over the weights of the model's settings, in a run that has no checkpoint yet; what is to be said."""
        said = self.config.model.start(self.model) if isinstance(self.model, Classifier) else []
        if self.average:
            self.average.load_state_dict(self.model.state_dict())
        return said

    def learned(self) -> Learned:
        """All that the next step goes on with."""
        tensors, tree = optimizer_state(self.optimizer)
        files: dict[str, Mapping[str, Tensor]] = {"model": self.model.state_dict(), "optimizer": tensors}
        files |= {"average": self.average.state_dict()} if self.average else {}
        files |= {"loss": {"state": self.state}} if len(self.state) else {}
        return Learned(files, {"optimizer": tree, "scaler": self.scaler.state_dict()})

    def load(self, learned: Learned) -> None:
        """What `learned` gave."""
        self.model.load_state_dict(learned.tensors["model"])
        load_optimizer(self.optimizer, learned.tensors["optimizer"], learned.plain["optimizer"])
        if self.average:
            self.average.load_state_dict(learned.tensors["average"])
        if len(self.state):
            self.state = learned.tensors["loss"]["state"].to(self.context.device)
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(learned.plain["scaler"])

    def _parts(self, batch: Images, partners: Images | None, step: int) -> Iterator[Part]:
        """The micro-batches, mixed."""
        config, first = self.config, self.places[0].start if self.places else 0
        for place in self.places:
            here = slice(place.start - first, place.stop - first)
            images, labels, cells = (column[here] for column in batch)
            if config.mixing.kind == "none":
                yield Part(images, labels, cells, None)
                continue
            others = Images(*(column[here] for column in partners)) if partners else None
            where = (config.seed, step, place.start, config.data.batch)
            mixed = config.mixing(images, labels, cells, others, *where)
            both = torch.cat([labels, mixed.labels]), torch.cat([cells, mixed.cells])
            yield Part(mixed.images, *both, torch.cat([mixed.share, 1 - mixed.share]))

    def _forward(self, part: Part, step: int, number: int) -> Tensor:
        """Logits of a micro-batch, in float32: [B, K], or [B, M, K] of M heads."""
        first = part_of(self.micro_batches, self.context.rank, self.context.workers).start
        torch.manual_seed(word(self.config.seed, step, first + number))  # of dropout, so that a resumed step repeats it
        with autocast(self.config, self.context):
            return self.gradients.forward(part.images, number + 1 == len(self.places)).float()

    @staticmethod
    def _losses(criterion: Criterion, logits: Tensor, part: Part) -> Tensor:
        """[T * B], of each label."""
        terms = len(part.labels) // max(len(part.images), 1)
        return criterion.losses(torch.cat([logits] * terms) if terms > 1 else logits, part.labels, part.cells)

    def _weights(
        self, criterion: Criterion, parts: list[Part], step: int
    ) -> tuple[list[Tensor | None], Tensor | float]:
        """[T * B] of each micro-batch, and their sum over all workers."""
        loss, progress = self.config.loss, step / self.steps
        if not isinstance(loss, Weighted) or loss.weights.kind == "equal" or progress < loss.deferred:
            return [part.shares for part in parts], float(self.config.data.batch)
        weights = [criterion.weights(part.labels, part.cells, progress) for part in parts]
        weights = [w if part.shares is None else w * part.shares for w, part in zip(weights, parts, strict=True)]
        return [*weights], self.gradients.total([w.sum() for w in weights])

    def _adapted(self, criterion: Criterion, losses: list[Tensor], parts: list[Part]) -> list[Tensor | None]:
        """[T * B] of each micro-batch, from the losses of the whole batch."""
        labels, cells = torch.cat([part.labels for part in parts]), torch.cat([part.cells for part in parts])
        shares = None if parts[0].shares is None else torch.cat([p.shares for p in parts if p.shares is not None])
        given = torch.cat([loss.detach() for loss in losses])
        self.state, weights = criterion.adapt(self.state, given, labels, cells, self.context.sum, shares)
        return [*(weights if shares is None else weights * shares).split([len(loss) for loss in losses])]

    def _update(self, what: Failure) -> None:
        """Lets the weights follow the gradient, unless it is not finite."""
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
        self.config.penalties.add_gradient(self.model)
        moving = [p for p in self.model.parameters() if p.grad is not None]
        norm = get_total_norm([p.grad for p in moving if p.grad is not None])
        wrong = ~norm.isfinite()
        if self.config.optimizer.clip:
            clip_grads_with_norm_(moving, self.config.optimizer.clip, norm)
        if self.scaler.is_enabled():
            scale = self.scaler._get_scale_async()
            wrong &= scale is not None and scale < 1  # above, the loss was scaled up too much: no fault of the data
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.found_inf = wrong.float()  # pyright: ignore[reportAttributeAccessIssue]  # a fused optimiser then leaves the weights as they are
            self.optimizer.step()
        self._remember(what, wrong)
        if self.average:
            _follow(self.average, self.model, self.config.train.average or 0.0, what.step)

    def _remember(self, what: Failure, wrong: Tensor) -> None:
        if not wrong.is_cuda:
            self._undecided.append((what, wrong, None))
            return
        host = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(wrong, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
        self._undecided.append((what, host, ready))


def compiled(network: nn.Module, sample: Tensor) -> nn.Module:
    """What torch makes of a network for images like the sample, [B, 3, H, W]; the network itself where it cannot."""
    before = {name: value.clone() for name, value in network.state_dict().items()}
    faster = torch.compile(network)
    try:
        faster(sample).float().sum().backward()
    except Exception as wrong:  # of any of torch's compilers, which know no common one
        say(f"torch cannot compile this model here, so it runs as it is: {str(wrong).strip().splitlines()[0]}")
        faster = network
    network.load_state_dict(before)
    network.zero_grad(set_to_none=True)
    return faster  # pyright: ignore[reportReturnType]


def autocast(config: Config, context: Context) -> contextlib.AbstractContextManager[Any]:
    """The precision in which the network computes."""
    half = context.device.type == "cuda" and torch.cuda.is_bf16_supported()
    match config.train.precision:
        case "float16":
            return torch.autocast(context.device.type, torch.float16)
        case "auto" | "bfloat16" if half or config.train.precision == "bfloat16":
            return torch.autocast(context.device.type, torch.bfloat16)
    return contextlib.nullcontext()


def word(*parts: int) -> int:
    """A seed that differs for every seed, step and micro-batch."""
    mixed = np.zeros(1, np.uint64)
    for part in parts:
        mixed = scramble(mixed + np.uint64(part) + np.uint64(0x9E3779B97F4A7C15))
    return int(mixed[0] >> np.uint64(1))


@torch.no_grad()
def _follow(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Moves a running mean of the weights and of the norms' statistics on. It forgets faster at first, or the weights
    that were drawn would stay in it for long."""
    decay = min(decay, (1 + step) / (10 + step))
    pairs = list(zip(*(chain(m.parameters(), m.buffers()) for m in (average, model)), strict=True))
    real = [(old, new) for old, new in pairs if old.is_floating_point()]
    old, new = [pair[0] for pair in real], [pair[1] for pair in real]
    torch._foreach_lerp_(old, new, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]
    for old, new in pairs:
        if not old.is_floating_point():
            old.copy_(new)


def _foremost(given: Tensor, part: Part) -> Tensor:
    """[B] of [T * B]: what belongs to the label of the larger share."""
    if part.shares is None:
        return given
    own, other = given.chunk(2)
    return torch.where(part.shares.chunk(2)[0] >= 0.5, own, other)


def _mean_over_heads(logits: Tensor) -> Tensor:
    return logits.mean(1) if logits.ndim == 3 else logits


def check_workers(config: Config, workers: int, device: torch.device | None = None) -> int:
    """The micro-batches of a batch. Refuses what so many workers cannot do."""
    faults: list[Fault] = []
    micro_batches = config.train.reproducible or workers * config.train.accumulate
    if workers > micro_batches:
        what = f"{workers} workers share {micro_batches} micro-batches"
        faults.append(Fault("train.reproducible", what, "give more of them, or fewer workers"))
    if micro_batches > 1 and config.data.batch // 2 < micro_batches:
        what = f"{config.data.batch} images make no {micro_batches} micro-batches of two or more"
        faults.append(Fault("data.batch", what, "give a larger batch"))
    if config.train.sync_batch_norm and workers > 1 and device is not None and device.type != "cuda":
        fix = "leave it out, or take train.reproducible"
        faults.append(Fault("train.sync_batch_norm", "torch has it on GPUs only", fix))
    if faults:
        raise Refusal("The workers do not fit the settings:", faults)
    return micro_batches
