"""What the loop does with its data: damaged rows, the time that is waited, and what decodes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from small_runs import config_for, train

from data_loaders import durable
from data_loaders.faults import Refusal
from data_loaders.images import decoder_name
from data_loaders.index import DamagedRow, open_index
from trainer import run
from trainer.collect import read_log


def damaged(dataset: Path, folder: Path, *rows: int) -> Path:
    """A copy of a data set with a bit of each of these rows changed."""
    shutil.copytree(dataset, folder)
    index = open_index(folder)
    for row in rows:
        shard = folder / "shards" / index.shards[index.shard[row]]
        content = bytearray(shard.read_bytes())
        content[index.offset[row] + 40] ^= 1
        shard.write_bytes(content)
    return folder


def common_row(dataset: Path) -> int:
    """A row that is learnt from, of the largest cell of the rarest class, which is drawn most often."""
    index = open_index(dataset)
    rows = index.rows_of("train")
    rarest = np.bincount(index.labels[rows]).argmin()
    rows = rows[index.labels[rows] == rarest]
    return int(rows[index.cells[rows] == np.bincount(index.cells[rows]).argmax()][0])


def test_a_training_stops_at_a_damaged_row_and_names_it(dataset, tmp_path):
    row = common_row(dataset)
    with pytest.raises(DamagedRow, match=rf"row {row} \("):
        train(config_for(damaged(dataset, tmp_path / "data", row), tmp_path / "runs"))


def test_a_training_that_skips_damaged_rows_counts_them_by_class_and_group_over_a_resume(dataset, tmp_path):
    row, index = common_row(dataset), open_index(dataset)
    data = damaged(dataset, tmp_path / "data", row)
    whole, parted = (config_for(data, tmp_path / name, **{"data.damaged": "skip"}) for name in ("whole", "parted"))
    reports = train(whole)
    counts = [report["skipped"] for report in reports.rows.values()]
    ((cell, k, n),) = counts[-1]
    assert (cell, k) == (index.cells[row], index.labels[row])
    assert n > len(counts[0]) >= 0
    train(parted, stop_after=4)
    assert train(parted).rows["step-000000012"] == reports.rows["step-000000012"]


@pytest.mark.parametrize("workers", [1, 2])
def test_the_ceiling_of_damaged_rows_is_that_of_all_workers(dataset, tmp_path, workers):
    index = open_index(dataset)
    rows = index.rows_of("train")
    kinds = index.labels[rows] * len(index.cell_names) + index.cells[rows]
    bad = rows[kinds == np.bincount(kinds).argmax()][:2].tolist()
    data = damaged(dataset, tmp_path / "data", *bad)
    changes = {"data.damaged": "skip", "cluster.workers": workers, "train.steps": 24, "train.report_every": 12}
    with pytest.raises(Refusal, match="2 damaged rows were met"):
        run.train(config_for(data, tmp_path / "few", **changes))
    config = config_for(data, tmp_path / "enough", **changes, **{"data.most_damaged": 0.02})
    run.train(config)
    assert durable.damage(config.run_folder / "model") is None


def test_a_memory_that_is_too_small_for_evaluation_is_told_before_anything_is_written(dataset, tmp_path):
    config = config_for(
        dataset, tmp_path, **{"data.memory": 1, "data.batch": 60, "data.size": 64, "cluster.workers": 2}
    )
    with pytest.raises(Refusal, match="hold less than three batches"):
        run.train(config)
    assert not config.run_folder.exists()


def test_skipped_rows_are_in_the_table_of_metrics(dataset, tmp_path):
    row, index = common_row(dataset), open_index(dataset)
    config = config_for(
        damaged(dataset, tmp_path / "data", row), tmp_path, **{"data.damaged": "skip", "cluster.on": "local"}
    )
    run.train(config)
    table = pq.read_table(config.run_folder / "metrics.parquet")
    last = [line for line in table.to_pylist() if (line["metric"], line["step"]) == ("skipped_rows", 12)]
    assert {line["class"] for line in last} == {index.classes[index.labels[row]]}
    assert {line["grouping"] for line in last} == {"all", "venue", "camera", "venue x camera"}
    assert len({line["value"] for line in last}) == 1
    assert last[0]["value"] == last[0]["n"] > 0


def test_reports_say_what_kept_the_data_back(dataset, tmp_path):
    config = config_for(dataset, tmp_path)
    run.train(config)
    for row in read_log(config.run_folder / "log.jsonl").values():
        speed = row["speed"]
        causes = [speed[f"data_wait_{cause}"] for cause in ("read", "decode", "augment", "copy")]
        assert all(0 <= share <= 1 for share in causes)
        assert sum(causes) == pytest.approx(speed["data_wait"], abs=1e-6)


def test_a_checkpoint_knows_what_decoded_the_images(dataset, tmp_path):
    config = config_for(dataset, tmp_path)
    train(config)
    (state,) = (config.run_folder / "checkpoints" / "step-000000012").glob("state.json")
    assert json.loads(state.read_text())["machine"]["decoder"] == decoder_name("auto")


def test_another_decoder_is_another_run_and_a_gpu_that_is_missing_is_told(dataset, tmp_path, capsys):
    config = config_for(dataset, tmp_path, **{"data.decoder": "gpu"})
    train(config)
    assert "nvJPEG is not here" in capsys.readouterr().err
    assert config.identity != config_for(dataset, tmp_path).identity
    assert durable.damage(config.run_folder / "model") is None


@pytest.mark.parametrize(
    "change", [{"data.loading": "processes"}, {"data.memory": 100}, {"data.threads": 1}, {"data.cache": "x"}]
)
def test_settings_of_speed_leave_the_identity_alone(dataset, tmp_path, change):
    assert config_for(dataset, tmp_path, **change).identity == config_for(dataset, tmp_path).identity
