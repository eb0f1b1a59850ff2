"""The torch Dataset and sampler, as a foreign training loop uses them."""

import pickle
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from data_loaders.decode import decode
from data_loaders.faults import Refusal
from data_loaders.index import DamagedRow, Reader, open_index
from data_loaders.torch import BalancedSampler, ShardDataset

ROOT = Path(__file__).parent.parent.parent


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image))


def spoiled(dataset: Path, tmp_path: Path, row: int) -> Path:
    """A copy of the data set with one bit of the image of a row turned."""
    copy = tmp_path / "spoiled"
    shutil.copytree(dataset, copy)
    index = open_index(copy)
    shard = copy / "shards" / index.shards[index.shard[row]]
    content = bytearray(shard.read_bytes())
    content[int(index.offset[row]) + 20] ^= 1
    shard.write_bytes(content)
    return copy


def flat(parts: Iterable[list[int]]) -> list[int]:
    return list(chain.from_iterable(parts))


def epoch(*samplers: BalancedSampler) -> list[list[int]]:
    return [list(sampler) for sampler in samplers]


def test_an_item_is_the_upright_image_of_a_row_with_the_number_of_its_class(dataset: Path):
    items, index = ShardDataset(dataset, "val"), open_index(dataset)
    rows = index.rows_of("val")
    assert len(items) == len(rows)
    reader = Reader(index)
    for item, row in enumerate(rows.tolist()):
        image, target = items[item]
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), decode(reader.read(row)))
        assert target == index.labels[row]


def test_it_has_what_foreign_scripts_ask_an_image_folder_for(dataset: Path):
    items = ShardDataset(dataset, "val", transform=lambda image: image.size, target_transform=lambda k: -k)
    assert items.classes == ["dessert", "drink", "food"]
    assert items.class_to_idx == {"dessert": 0, "drink": 1, "food": 2}
    assert items.targets == [k for _, k in items.samples]
    assert items.samples is items.imgs
    assert items.samples[0] == ("val-dessert-0.png", 0)
    assert items[len(items) - 1] == ((12, 12), -2)
    assert "33 items of 3 classes" in repr(items)


def test_groups_come_with_an_item_or_stand_in_for_the_label(dataset: Path):
    items, index = ShardDataset(dataset, "test", pixels, return_groups=True), open_index(dataset)
    row = int(items.rows[5])
    assert items[5][2] == {"venue": index.groups[row, 0], "camera": index.groups[row, 1]}
    *_, groups = next(iter(DataLoader(items, batch_size=8)))
    assert groups["camera"].tolist() == items.groups[:8, 1].tolist()
    cameras = ShardDataset(dataset, "test", target="camera")
    assert cameras.classes == ["phone", "slr"]
    assert cameras.targets == items.groups[:, 1].tolist()


@pytest.mark.parametrize("change", [{"split": "far"}, {"target": "weather"}, {"generation": 7}])
def test_a_split_column_or_generation_that_is_not_there_is_refused_with_those_that_are(dataset: Path, change):
    with pytest.raises(Refusal) as refusal:
        ShardDataset(dataset, **change)
    assert refusal.value.faults[0].fix


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_read_what_the_process_itself_reads(dataset: Path, start):
    items = ShardDataset(dataset, "train", Upright())
    items[0]  # a file is open when the workers start
    one = DataLoader(items, batch_size=16)
    two = DataLoader(items, batch_size=16, num_workers=2, multiprocessing_context=start)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        for (a, k), (b, j) in zip(one, two, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(k, j)


class Upright:
    """A transform that can be pickled."""

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return pixels(image)


def test_a_pickle_holds_no_open_file_and_no_list_of_all_rows(dataset: Path):
    items = ShardDataset(dataset, "train")
    lean = len(pickle.dumps(items))
    assert items.samples
    assert items.targets
    assert len(pickle.dumps(items)) == lean
    again = pickle.loads(pickle.dumps(items))  # noqa: S301, our own
    assert np.array_equal(np.asarray(again[3][0]), np.asarray(items[3][0]))


def test_one_turned_bit_is_told_with_its_row_also_by_a_worker(dataset: Path, tmp_path: Path):
    items = ShardDataset(spoiled(dataset, tmp_path, 2), "train", pixels)
    item = items.rows.tolist().index(2)
    with pytest.raises(DamagedRow, match="row 2 "):
        items[item]
    with pytest.raises(DamagedRow, match="row 2 "):
        list(DataLoader(items, num_workers=1, multiprocessing_context="fork"))


def test_importing_it_brings_neither_ray_nor_wandb_nor_the_trainer():
    program = "import sys, data_loaders.torch; assert not {'ray', 'wandb', 'trainer', 'jobs'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


@pytest.mark.parametrize("by", ["label", "group", "label_and_group"])
def test_every_stratum_has_exactly_its_share_of_each_cycle(dataset: Path, by):
    items = ShardDataset(dataset, "train")
    keys = {"label": items.targets, "group": map(tuple, items.groups.tolist())}
    keys["label_and_group"] = list(zip(items.targets, map(tuple, items.groups.tolist()), strict=True))
    strata = list(keys[by])
    sampler = BalancedSampler(items, by, num_samples=7 * len(set(strata)))
    drawn = Counter(strata[item] for item in sampler)
    assert drawn == dict.fromkeys(strata, 7)


def test_at_temper_1_every_item_comes_once_in_an_epoch(dataset: Path):
    items = ShardDataset(dataset, "train")
    assert sorted(BalancedSampler(items, temper=1)) == list(range(len(items)))


@pytest.mark.parametrize(("world", "batch"), [(1, 12), (2, 6), (3, 4), (4, 3), (6, 2)])
def test_ranks_together_draw_the_same_global_batches_each_a_contiguous_part(dataset: Path, world, batch):
    items = ShardDataset(dataset, "train")
    (whole,) = epoch(BalancedSampler(items, num_samples=84))
    parts = epoch(
        *(BalancedSampler(items, num_samples=84, rank=r, world_size=world, batch_size=batch) for r in range(world))
    )
    for step in range(7):
        for rank, part in enumerate(parts):
            assert part[step * batch :][:batch] == whole[step * 12 + rank * batch :][:batch]


@pytest.mark.parametrize("batch", [1, 4])
def test_an_epoch_that_cannot_be_divided_is_rounded_up_with_what_comes_next(dataset: Path, batch):
    items = ShardDataset(dataset, "train")
    alone = BalancedSampler(items, num_samples=25)
    ranks = [BalancedSampler(items, num_samples=25, rank=r, world_size=3, batch_size=batch) for r in range(3)]
    first, second, third = list(alone), list(alone), list(alone)
    for whole, after in ((first, second), (second, third)):
        drawn = epoch(*ranks)
        assert [len(part) for part in drawn] == [len(rank) for rank in ranks] == [9, 9, 9]
        assert sorted(flat(drawn)) == sorted([*whole, *after[:2]])


def test_epochs_go_on_by_themselves_and_any_can_be_asked_for(dataset: Path):
    items = ShardDataset(dataset, "train")
    a, b = BalancedSampler(items), BalancedSampler(items)
    first, second = list(a), list(a)
    assert first != second
    b.set_epoch(1)
    assert list(b) == second
    b.set_epoch(0)
    assert list(b) == first
    assert next(iter(b)) == second[0]
    assert list(b) == second  # what was broken off begins anew
    assert list(BalancedSampler(items, seed=1)) != first


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resume_on_another_number_of_ranks_goes_on_with_the_very_next_items(dataset: Path, workers):
    items = ShardDataset(dataset, "train", pixels)
    (whole,) = epoch(BalancedSampler(items, num_samples=80))
    sampler = BalancedSampler(items, num_samples=80, batch_size=8)
    loader = DataLoader(items, batch_size=8, sampler=sampler, num_workers=workers, multiprocessing_context=None)
    for step, _ in enumerate(loader):
        if step == 4:
            break
    state = sampler.state_dict(trained=8 * 5)
    assert state == {"epoch": 0, "position": 40}
    assert workers or sampler.state_dict() == state
    ranks = [BalancedSampler(items, num_samples=80, rank=r, world_size=2, batch_size=4) for r in range(2)]
    for rank in ranks:
        rank.load_state_dict(state)
        rank.set_epoch(0)  # as a script that resumes does
    left = epoch(*ranks)
    for step in range(5):
        assert flat(part[4 * step : 4 * step + 4] for part in left) == whole[40 + 8 * step : 48 + 8 * step]


def test_the_state_after_a_whole_epoch_is_the_begin_of_the_next(dataset: Path):
    items = ShardDataset(dataset, "train")
    sampler, other = BalancedSampler(items), BalancedSampler(items)
    list(sampler)
    other.load_state_dict(sampler.state_dict())
    assert list(other) == list(sampler)


def test_faults_of_use_are_told(dataset: Path):
    items = ShardDataset(dataset, "train")
    with pytest.raises(ValueError, match="rank 2 is not one of 2"):
        BalancedSampler(items, rank=2, world_size=2)
    with pytest.raises(Refusal, match="no group column 'weather'"):
        BalancedSampler(items, "group", columns=("weather",))
