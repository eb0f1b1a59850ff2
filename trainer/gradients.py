"""How the gradients of micro-batches become that of the global batch.

A step's batch is cut into micro-batches, of which each worker has some in a row. `Plain` is one worker, or torch's
DistributedDataParallel over several: fast, but a sum over workers rounds otherwise for another number of them.
`Reproducible` adds the gradients of a fixed number of micro-batches in a fixed binary tree, and lets batch norms take
in their statistics in a fixed order, so that the weights are the same bits for any number of workers.
"""

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from trainer.context import Context


def part_of(parts: int, rank: int, workers: int) -> range:
    """The micro-batches of a worker."""
    return range(parts * rank // workers, parts * (rank + 1) // workers)


class Branch(NamedTuple):
    """Of the tree: the sum of some micro-batches in a row."""

    first: int
    size: int
    gradient: list[Tensor]
    """Of each parameter."""


class Gradients(Protocol):
    """Of one step after another: forward and backward for each micro-batch of this worker, in order, then finish."""

    def forward(self, images: Tensor, last: bool) -> Tensor:
        """Logits of a micro-batch; `last` says that it is this worker's last one in the step."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Takes the gradient of a micro-batch's part of the loss."""
        ...

    def total(self, values: Sequence[Tensor]) -> Tensor:
        """The sum of one value of each micro-batch of this worker over all workers."""
        ...

    def finish(self) -> None:
        """From here on the gradient of every parameter is that of the global batch."""
        ...


class Plain:
    """Adds up over this worker's micro-batches, then over the workers."""

    def __init__(self, network: nn.Module, context: Context) -> None:
        self.context, self.network = context, network
        if context.workers > 1:
            self.network = DistributedDataParallel(network, gradient_as_bucket_view=True)
            self.network.broadcast_buffers = False  # each step would send them, and only evaluation reads them

    def forward(self, images: Tensor, last: bool) -> Tensor:
        if isinstance(self.network, DistributedDataParallel):
            self.network.require_backward_grad_sync = last
        return self.network(images)

    def backward(self, loss: Tensor) -> None:
        (loss * self.context.workers).backward()  # DDP divides by the number of workers

    def total(self, values: Sequence[Tensor]) -> Tensor:
        return self.context.sum(torch.stack(list(values)).sum(0))

    def finish(self) -> None:
        """DDP has done it in the last backward."""


class Reproducible:
    """Adds in a binary tree over all micro-batches, of which a worker has whole branches.

    It keeps a gradient for each branch, and sends them to all workers; batch norms see one micro-batch at a time.
    """

    def __init__(self, model: nn.Module, context: Context, parts: int) -> None:
        """`parts` are the micro-batches of all workers."""
        self.network, self.context, self.parts = model, context, parts
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        self.begin()

    def begin(self) -> None:
        """Forgets the last step."""
        self.branches: list[Branch] = []
        self.statistics: list[Tensor] = []
        self.next = part_of(self.parts, self.context.rank, self.context.workers).start

    def forward(self, images: Tensor, last: bool) -> Tensor:
        learning = self._learning_norms()
        kept = [(norm.momentum, dict(norm.named_buffers())) for norm in learning]
        for norm in learning:  # other buffers, which at a momentum of 1 become the statistics of this micro-batch
            norm.momentum = 1.0
            for name, buffer in norm.named_buffers():
                setattr(norm, name, torch.zeros_like(buffer))
        try:
            logits = self.network(images)
            found = [part for norm in learning for part in _running(norm)]
        finally:
            for norm, (momentum, buffers) in zip(learning, kept, strict=True):
                norm.momentum = momentum
                for name, buffer in buffers.items():
                    setattr(norm, name, buffer)
        self.statistics.append(torch.cat([logits.new_zeros(0, dtype=torch.float32), *found]))
        return logits

    def backward(self, loss: Tensor) -> None:
        for parameter in self.parameters:
            parameter.grad = None
        loss.backward()
        _grow(self.branches, Branch(self.next, 1, [_laid_out(p.grad, p) for p in self.parameters]))
        self.next += 1

    def total(self, values: Sequence[Tensor]) -> Tensor:
        whole = self._of_all(list(values))
        total = whole[0]
        for value in whole[1:]:
            total = total + value
        return total

    def finish(self) -> None:
        branches: list[Branch] = []
        for branch in self._branches_of_all():
            _grow(branches, branch)
        while len(branches) > 1:  # of a number of micro-batches that is no power of two
            last = branches.pop()
            _add(branches[-1].gradient, last.gradient)
        for parameter, gradient in zip(self.parameters, branches[0].gradient, strict=True):
            parameter.grad = gradient
        self._take_in(self._of_all(self.statistics))
        self.begin()

    def _branches_of_all(self) -> list[Branch]:
        """The branches of all workers, in the order of their micro-batches."""
        workers = self.context.workers
        if workers == 1:
            return self.branches
        places = [_branches_of(part_of(self.parts, rank, workers)) for rank in range(workers)]
        flat = [torch.cat([_flat(g) for g in branch.gradient]) for branch in self.branches]
        held = _gather(flat, [len(of_rank) for of_rank in places], self.context)
        sizes = [p.numel() for p in self.parameters]
        return [
            Branch(*place, [_unflat(g, p) for g, p in zip(whole.split(sizes), self.parameters, strict=True)])
            for place, whole in zip(chain.from_iterable(places), held, strict=True)
        ]

    @torch.no_grad()
    def _take_in(self, statistics: list[Tensor]) -> None:
        """Updates the running statistics of batch norms, micro-batch by micro-batch."""
        learning = self._learning_norms()
        for seen in statistics:
            parts = iter(seen.split([norm.num_features for norm in learning for _ in range(2)]) if learning else ())
            for norm in learning:
                for running in _running(norm):
                    running.lerp_(next(parts), norm.momentum or 0.0)
        for norm in learning:
            norm.get_buffer("num_batches_tracked").add_(self.parts)

    def _learning_norms(self) -> list[_BatchNorm]:
        return [norm for norm in self.norms if norm.training]

    def _of_all(self, values: list[Tensor]) -> list[Tensor]:
        """A value of each micro-batch, in their order."""
        counts = [len(part_of(self.parts, rank, self.context.workers)) for rank in range(self.context.workers)]
        return _gather(values, counts, self.context)


def _running(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    return norm.get_buffer("running_mean"), norm.get_buffer("running_var")


def _branches_of(share: range) -> list[tuple[int, int]]:
    """First and size of the whole branches of the tree that a range of leaves is made of."""
    found: list[tuple[int, int]] = []
    for leaf in share:
        found.append((leaf, 1))
        while len(found) > 1 and _are_twins(found[-2], found[-1]):
            found[-2:] = [(found[-2][0], 2 * found[-2][1])]
    return found


def _grow(branches: list[Branch], new: Branch) -> None:
    """Puts a branch beside the others, and adds those that are the two halves of a larger one."""
    branches.append(new)
    while len(branches) > 1 and _are_twins(branches[-2][:2], branches[-1][:2]):
        (first, size, left), (_, _, right) = branches[-2:]
        _add(left, right)
        branches[-2:] = [Branch(first, 2 * size, left)]


def _add(left: list[Tensor], right: list[Tensor]) -> None:
    if left:
        torch._foreach_add_(left, right)  # pyright: ignore[reportPrivateImportUsage]


def _laid_out(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    """A gradient laid out in memory as its parameter is; zeros where there is none."""
    if gradient is None:
        return torch.zeros_like(parameter)
    return gradient if gradient.stride() == parameter.stride() else torch.empty_like(parameter).copy_(gradient)


def _flat(dense: Tensor) -> Tensor:
    """Its numbers as they lie in memory."""
    return dense.as_strided((dense.numel(),), (1,))


def _unflat(flat: Tensor, like: Tensor) -> Tensor:
    """What `_flat` made of a tensor like this."""
    return flat.clone().as_strided(like.shape, like.stride())


def _are_twins(left: tuple[int, int], right: tuple[int, int]) -> bool:
    return left[1] == right[1] and left[0] % (2 * left[1]) == 0


def _gather(mine: list[Tensor], counts: list[int], context: Context) -> list[Tensor]:
    """The tensors of all workers, in the order of the ranks; so many of each, all of one shape."""
    if context.workers == 1:
        return mine
    most = max(counts)
    padded = torch.stack(mine + [torch.zeros_like(mine[0])] * (most - len(mine)))
    out = [torch.empty_like(padded) for _ in counts]
    distributed.all_gather(out, padded)
    return [tensor for count, tensors in zip(counts, out, strict=True) for tensor in tensors[:count]]
