"""A data set for those who have their own training loop: a map-style torch Dataset over a split, in the shape of
torchvision's ImageFolder, and a sampler with our exact quotas. Needs neither Ray nor the trainer."""

from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch.distributed
from PIL import Image
from torch.utils.data import Dataset, Sampler

from data_loaders.faults import Fault, Refusal
from data_loaders.images import picture
from data_loaders.index import Ints, Reader, open_index
from data_loaders.loader import ids_of
from data_loaders.sampler import AnySampler, Stratified

AT_ONCE = 2**16
"""Positions whose rows are computed at once."""


class ShardDataset(Dataset[tuple[Any, ...]]):
    """The rows of a split: (image, target), or (image, target, groups).

    The image is an upright RGB PIL image, or what `transform` makes of it; each read is checked against the checksum of
    its row. Can be pickled, so `num_workers` may be anything, under fork and under spawn.

    Raises Refusal where there is no such data set, split or column; an item raises DamagedRow.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[int], Any] | None = None,
        *,
        target: str = "label",
        return_groups: bool = False,
        generation: int | None = None,
    ) -> None:
        """`target` is `label` or a group column, which is then learnt in place of the label. With `return_groups`, an
        item ends in group column -> position in `group_values`. `generation` is by default the newest."""
        self.root, self.split = str(root), split
        self.transform, self.target_transform, self.return_groups = transform, target_transform, return_groups
        self.index = open_index(Path(root).resolve(), generation)
        self.rows: Ints = self.index.rows_of(split)
        """Row of the data set of each item, [N]."""
        self.group_values = self.index.group_values
        """Group column -> its values."""
        if target == "label":
            self.classes, self._targets = list(self.index.classes), self.index.labels[self.rows]
        elif target in self.group_values:
            column = list(self.group_values).index(target)
            self.classes, self._targets = list(self.group_values[target]), self.index.groups[self.rows, column]
        else:
            fix = f"there are: {', '.join(('label', *self.group_values))}"
            raise Refusal("The target does not fit the data:", [Fault("target", f"no column {target!r}", fix)])
        self._reader = Reader(self.index)

    @property
    def class_to_idx(self) -> dict[str, int]:
        return {name: k for k, name in enumerate(self.classes)}

    @cached_property
    def targets(self) -> list[int]:
        """Class of each item, [N]."""
        return self._targets.tolist()

    @cached_property
    def samples(self) -> list[tuple[str, int]]:
        """Id and class of each item, [N]; what is a path in ImageFolder is an id here, there is no such file."""
        return list(zip(ids_of(self.index, self.rows).to_pylist(), self.targets, strict=True))

    @property
    def imgs(self) -> list[tuple[str, int]]:
        """As `samples`, by the older name that torchvision keeps."""
        return self.samples

    @property
    def groups(self) -> Ints:
        """Position of each item's value in each of the `group_values`, [N, A]."""
        return self.index.groups[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: int) -> tuple[Any, ...]:
        row = int(self.rows[item])
        image: Any = Image.fromarray(picture(self._reader, row))
        target: Any = int(self._targets[item])
        image = self.transform(image) if self.transform else image
        target = self.target_transform(target) if self.target_transform else target
        if not self.return_groups:
            return image, target
        return image, target, dict(zip(self.group_values, self.index.groups[row].tolist(), strict=True))

    def __getstate__(self) -> dict[str, Any]:
        """Without open files, and without the lists that can be made again."""
        return {name: value for name, value in vars(self).items() if name not in {"_reader", "targets", "samples"}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._reader = Reader(self.index)

    def __repr__(self) -> str:
        return f"ShardDataset({self.root!r}, {self.split!r}): {len(self):,} items of {len(self.classes):,} classes"


class BalancedSampler(Sampler[int]):
    """Draws the items of a ShardDataset so that strata (classes, groups, or both) have exactly their shares: at
    `temper` 0 all the same, at 1 as many as they have rows. See data_loaders/sampler.py.

    Epoch e takes positions e * num_samples … of one endless stream, so that the items of a stratum repeat evenly over
    epochs too. Ranks together take those very positions, whatever their number is; with `batch_size`, that of the
    DataLoader of one rank, each takes a contiguous part of every global batch. Each rank has as many as the others:
    where `num_samples` cannot be divided, at most `world_size` - 1 positions are drawn that the next epoch draws again.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        by: Literal["label", "group", "label_and_group"] = "label",
        temper: float = 0.0,
        seed: int = 0,
        num_samples: int | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        *,
        columns: tuple[str, ...] = (),
        batch_size: int = 1,
        sampler: AnySampler | None = None,
        epochs: int | None = None,
    ) -> None:
        """`columns` are the group columns that count for `by`; by default all, intersected. `num_samples` is that of an
        epoch over all ranks, by default one for each item. `rank` and `world_size` are by default those of
        torch.distributed. `sampler` is any other mix, in place of `by`, `temper` and `columns`; one that changes, such
        as Progressive(), needs the `epochs` of the whole training."""
        joined = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.rank = rank if rank is not None else torch.distributed.get_rank() if joined else 0
        self.world_size = world_size or (torch.distributed.get_world_size() if joined else 1)
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} is not one of {self.world_size}")
        self.num_samples, self.batch_size = num_samples or len(dataset), batch_size
        self._rows = dataset.rows
        mix = sampler or Stratified(by=by, columns=columns, temper=temper)
        positions = epochs * self.num_samples if epochs else None
        self._stream = mix.over(dataset.index, dataset.rows, seed, positions)
        self.epoch = 0
        self._start = self._drawn = 0  # positions of the epoch that all ranks together had at the resume, and have now
        self._ended = False

    def __len__(self) -> int:
        """Items of a whole epoch on this rank."""
        return (self.num_samples + self.world_size - 1) // self.world_size

    def __iter__(self) -> Iterator[int]:
        """The epoch, or what a resume left of it; after a whole one comes the next, unless `set_epoch` says another."""
        if self._ended:
            self.set_epoch(self.epoch + 1)
        left = -(-(self.num_samples - self._start) // self.world_size)
        for begin in range(0, left, AT_ONCE):
            turns = np.arange(begin, min(begin + AT_ONCE, left))
            rows = self._stream.rows(self.epoch * self.num_samples + self._start + self._places(turns, left))
            for turn, item in zip(turns.tolist(), np.searchsorted(self._rows, rows).tolist(), strict=True):
                self._drawn = self._start + (turn + 1) * self.world_size
                yield item
        self._ended = True

    def set_epoch(self, epoch: int) -> None:
        """Which epoch comes next. That of a resume goes on from where it was."""
        if epoch != self.epoch or self._ended:
            self.epoch, self._start, self._drawn, self._ended = epoch, 0, 0, False

    def state_dict(self, trained: int | None = None) -> dict[str, int]:
        """Where the stream stands, the same for all ranks and for any number of them.

        A DataLoader with workers draws ahead of the training: give the items that this rank has `trained` on since the
        epoch or the resume began, such as batch_size * (step + 1). By default it is those that were drawn.
        """
        done = self._drawn if trained is None else self._start + trained * self.world_size
        return {"epoch": self.epoch, "position": min(done, self.num_samples)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on from there; it may have been another number of ranks that came so far."""
        whole = state["position"] >= self.num_samples
        self.epoch, self._ended = state["epoch"], whole
        self._start = self._drawn = 0 if whole else state["position"]

    def _places(self, turns: Ints, left: int) -> Ints:
        """Place of this rank's turns among the positions that are left: batch by batch, this rank's part of each."""
        batch, inside = np.divmod(turns, self.batch_size)
        size = np.minimum(self.batch_size, left - batch * self.batch_size)  # the last batch may be smaller
        return batch * self.batch_size * self.world_size + self.rank * size + inside
