"""The same bits however rows are dealt to workers: a tally is a sum of integers."""

import multiprocessing
from pathlib import Path

import numpy as np
import torch
from torch import distributed
from torch.multiprocessing.spawn import start_processes

from trainer.decision.ledger import log_softmax
from trainer.metrics.comparisons import comparisons
from trainer.metrics.tally import Shape, Tally, count

SHAPE = Shape(5, 4)
ROWS = 333
MOST = 8


def _rows() -> list[torch.Tensor]:
    """Log probabilities, decisions, labels, cells and valid; in the order of a data set that lists group by group, so
    that a worker with a contiguous part sees few groups. Nobody is in group 3."""
    random = np.random.default_rng(0)
    cells = np.sort(random.choice([0, 1, 2, 4], ROWS, p=[0.6, 0.2, 0.1, 0.1]))
    labels = random.integers(0, SHAPE.classes, ROWS)
    log_p = log_softmax(random.normal(0, 2, (ROWS, SHAPE.classes)))
    parts = (log_p, log_p.argmax(1), labels, cells, np.ones(ROWS, bool))
    return [torch.from_numpy(part) for part in parts]


def _counted(rows: np.ndarray, batch: int) -> torch.Tensor:
    sums, (log_p, decisions, labels, cells, valid) = torch.zeros(SHAPE.size, dtype=torch.int64), _rows()
    for i in map(torch.from_numpy, np.split(rows, range(batch, len(rows), batch))):
        count(sums, log_p[i], decisions[i], labels[i], cells[i], valid[i], SHAPE)
    return sums


def _work(rank: int, out: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=MOST)
    for workers in range(1, MOST + 1):
        group = distributed.new_group(list(range(workers)))
        for name, order in {"listed": np.arange(ROWS), "shuffled": np.random.default_rng(1).permutation(ROWS)}.items():
            if isinstance(group, distributed.ProcessGroup):
                total = _counted(np.array_split(order, workers)[rank], 1 + 7 * workers)
                distributed.all_reduce(total, group=group)
                np.save(Path(out) / f"{name}-{workers}-{rank}.npy", total.numpy())
    distributed.destroy_process_group()


def test_one_to_eight_workers_have_the_same_tally_bit_for_bit_with_groups_absent_on_some(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    multiprocessing.set_forkserver_preload(["torch.distributed", "trainer.metrics.tally"])  # once, not in all eight
    start_processes(_work, (str(tmp_path),), nprocs=MOST, start_method="forkserver")
    alone = _counted(np.arange(ROWS), ROWS).numpy()
    found = sorted(tmp_path.glob("*.npy"))
    assert len(found) == 2 * sum(range(1, MOST + 1))
    for path in found:
        np.testing.assert_array_equal(np.load(path), alone, err_msg=path.name)
    tally = Tally.of(alone, SHAPE)
    assert tally.n.tolist()[3] == 0
    assert tally.n.sum() == ROWS
    assert (comparisons(tally)["accuracy_difference"].n > 0).all()
