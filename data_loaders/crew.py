"""Those who fill batches, ahead of whoever takes them: threads, each of which may have a process to do its work."""

import mmap
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from threading import local
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from data_loaders.faults import Fault, Refusal
from data_loaders.images import Filled, Filler, Recipe
from data_loaders.index import Index, Ints, index_of
from data_loaders.staging import Stager

Loading = Literal["threads", "processes"]
LEAST_ROWS, MOST_BYTES, MOST_ALTERED = 8, 2**20, 2**23
"""Rows, and bytes of pixels, that a thread takes at a time: fewer cost more to hand out than small images take, more
leave others idle. Where pixels are altered it takes more, since some 350 calls of torch do so, for any number."""


class Part(NamedTuple):
    """Some places of a batch that are filled at a time."""

    rows: Ints
    positions: Ints
    start: int
    """First place."""


class Begun(NamedTuple):
    """A batch that is being filled."""

    rows: Ints
    positions: Ints
    images: NDArray[np.uint8]
    """[places, size, size, 3]"""
    parts: list[tuple[int, Future[Filled]]]
    """First place of each part, and what comes of it."""

    def wait(self) -> Filled:
        """What filling all of it took; places are those of the batch."""
        done = [(first, future.result()) for first, future in self.parts]
        return Filled(
            np.sum([part.seconds for _, part in done], axis=0),
            [(first + place, wrong) for first, part in done for place, wrong in part.damaged],
            [(first + place, file) for first, part in done for place, file in part.files],
        )


class Block(Protocol):
    """Memory of one batch."""

    number: int
    """File descriptor of memory that other processes see; -1 of memory that they do not."""

    def array(self) -> NDArray[np.uint8]: ...


class Own:
    """Memory of this process, which is given back to the system when it ends. With `shared`, others may map it."""

    def __init__(self, size: int, shared: bool = False) -> None:
        self.number = os.memfd_create("batch", os.MFD_CLOEXEC) if shared else -1
        if shared:
            os.ftruncate(self.number, size)
        self._memory = mmap.mmap(self.number, size)

    def array(self) -> NDArray[np.uint8]:
        return np.frombuffer(self._memory, np.uint8)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


class Pinned:
    """Memory from which a GPU copies while the host goes on."""

    number = -1

    def __init__(self, size: int) -> None:
        import torch

        self._memory = torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def array(self) -> NDArray[np.uint8]:
        return self._memory.numpy()


class Blocks:
    """Memory of batches, used again as soon as nobody holds an array that lies in it: new pages cost a batch of
    photographs some 1 % of its time, and more memory than there are batches at a time."""

    def __init__(self, shape: tuple[int, ...], make: Callable[[int], Block]) -> None:
        self._shape, self._make = shape, make
        self._free: list[Block] = []

    def take(self) -> tuple[Block, NDArray[np.uint8]]:
        """A block, and all of it as an array of the shape."""
        block = self._free.pop() if self._free else self._make(int(np.prod(self._shape)))
        owner = block.array()
        weakref.finalize(owner, self._free.append, block).atexit = False
        return block, owner.reshape(self._shape)


class Crew:
    """Fills batches of shape [B, size, size, 3] by a recipe, in so many threads."""

    def __init__(
        self,
        index: Index,
        recipe: Recipe,
        places: int,
        threads: int,
        loading: Loading,
        pinned: bool,
    ) -> None:
        self._shape = (places, recipe.size, recipe.size, 3)
        self._filler = Filler(index, recipe)
        self._stager = Stager(index, recipe.cache) if recipe.cache else None
        self._helpers = Helpers(index, recipe, self._shape) if loading == "processes" else None
        shared = loading == "processes"
        self._blocks = Blocks(self._shape, Pinned if pinned and not shared else partial(Own, shared=shared))
        self._pool = ThreadPoolExecutor(threads, "loader")
        turns, most = (1, MOST_ALTERED) if recipe.alters else (2, MOST_BYTES)
        self._rows = max(min(-(-places // (turns * threads)), most // (3 * recipe.size**2)), LEAST_ROWS)

    def start(self, rows: Ints, positions: Ints) -> Begun:
        """Begins a batch."""
        block, images = self._blocks.take()
        images[len(rows) :] = 0
        self._filler.expect(rows)
        parts = []
        for start in range(0, len(rows), self._rows):
            part = Part(rows[start : start + self._rows], positions[start : start + self._rows], start)
            parts.append((start, self._pool.submit(self._fill, part, block, images)))
        return Begun(rows, positions, images, parts)

    def fill(self, row: int, position: int, image: NDArray[np.uint8]) -> Filled:
        """One image, [size, size, 3], at once."""
        return self._filler.fill(np.array([row]), np.array([position]), image[None])

    def _fill(self, part: Part, block: Block, images: NDArray[np.uint8]) -> Filled:
        if self._helpers:
            return self._helpers.fill(part, block.number)
        return self._filler.fill(part.rows, part.positions, images[part.start : part.start + len(part.rows)])

    def close(self) -> None:
        """Waits for what was begun, which holds memory that must not be written to any more."""
        self._pool.shutdown(cancel_futures=True)
        if self._helpers:
            self._helpers.close()
        if self._stager:
            self._stager.close()
        self._filler.close()


class Helpers:
    """A process for each thread that calls. One whose parent is gone reads the end of its pipe, and ends.

    They are started as a command, not by `multiprocessing`, which would run the caller's script once more in each.
    """

    def __init__(self, index: Index, recipe: Recipe, shape: tuple[int, ...]) -> None:
        self._about = (index.folder, index.manifest, recipe, shape)
        self._mine = local()
        self._all: list[tuple[subprocess.Popen[bytes], Connection]] = []

    def fill(self, part: Part, number: int) -> Filled:
        pipe = self._pipe()
        try:
            pipe.send((part, number))
            answer = pipe.recv()
        except (EOFError, OSError) as wrong:
            what = f"process {self._mine.process.pid} ended with exit code {self._mine.process.wait()}"
            fix = "look for what ended it, such as too little memory; or set data.loading=threads"
            raise Refusal("A process that loads images is gone:", [Fault("data.loading", what, fix)], 75) from wrong
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _pipe(self) -> Connection:
        if not hasattr(self._mine, "pipe"):
            ours, theirs = Pipe()
            begin = (
                f"import sys; sys.path[:] = {[str(path) for path in sys.path]}; from data_loaders.crew import help_with"
            )
            command = [sys.executable, "-c", f"{begin}; help_with({theirs.fileno()}, {os.getpid()})"]
            process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
            theirs.close()
            self._mine.pipe, self._mine.process = ours, process
            self._all.append((process, ours))
            ours.send(self._about)
        return self._mine.pipe

    def close(self) -> None:
        for _, pipe in self._all:
            pipe.close()
        for process, _ in self._all:
            process.wait()


def help_with(number: int, parent: int) -> None:
    """The work of a helping process, which is told of it through the pipe with this file descriptor."""
    for number_of_signal in (signal.SIGINT, signal.SIGTERM):  # which terminals and schedulers send to all
        signal.signal(number_of_signal, signal.SIG_IGN)  # the parent decides: the end of the pipe ends this process
    with suppress(EOFError, OSError), Connection(number) as pipe:
        folder, manifest, recipe, shape = pipe.recv()
        filler: Filler | None = None
        blocks: dict[int, NDArray[np.uint8]] = {}
        while True:
            part, block = pipe.recv()
            try:
                filler = filler or Filler(index_of(folder, manifest, verifies=False), recipe)
                if block not in blocks:
                    with Path(f"/proc/{parent}/fd/{block}").open("r+b") as file:
                        blocks[block] = np.frombuffer(mmap.mmap(file.fileno(), 0), np.uint8).reshape(shape)
                here = slice(part.start, part.start + len(part.rows))
                pipe.send(filler.fill(part.rows, part.positions, blocks[block][here]))
            except Exception as wrong:
                pipe.send(wrong)
