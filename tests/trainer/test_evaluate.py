from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import CPU, config_for, train

from data_loaders.augment import centred
from data_loaders.decode import decode
from data_loaders.index import Reader, open_index
from data_loaders.loader import Data
from trainer import checkpoint, evaluate
from trainer.context import Cluster, Local, spawn
from trainer.metrics.tally import Shape
from trainer.report.page import read_tallies

BATCH = 5
"""Rows are 37: the last batch is padded, and ranks get unequal shares."""


@pytest.fixture(scope="module")
def trained(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = config_for(dataset, tmp_path_factory.mktemp("runs"))
    train(config)
    return config.run_folder


def _evaluate(rank: int, run: str, data: str, out: str, workers: int) -> None:
    torch.set_num_threads(1)
    model = checkpoint.load_model(Path(run) / "model", CPU)
    index = open_index(Path(data))
    settings = Data(path=Path(data), size=12, batch=BATCH)
    context = Local(Path(out), CPU, rank, workers)
    found = evaluate.evaluate(model.model, model.ledger, index, settings, "test", context)
    evaluate.save(Path(out) / f"rank{rank}", found, {})


@pytest.fixture(scope="module")
def alone(dataset: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone")
    _evaluate(0, str(trained), str(dataset), str(out), 1)
    return out / "rank0" / "test"


@pytest.mark.parametrize("workers", [2, 3])
def test_the_same_weights_have_the_same_tallies_bit_for_bit_on_any_number_of_workers(
    dataset, trained, alone, tmp_path, workers
):
    spawn(
        _evaluate,
        Cluster(on="local", workers=workers, device="cpu"),
        str(trained),
        str(dataset),
        str(tmp_path),
        workers,
    )
    expected = read_tallies(alone)
    for rank in range(workers):
        found = read_tallies(tmp_path / f"rank{rank}" / "test")
        assert found.keys() == expected.keys() == {"argmax", "ledger"}
        for name, tally in found.items():
            np.testing.assert_array_equal(tally.vector(), expected[name].vector())
        predictions = (tmp_path / f"rank{rank}" / "test" / "predictions.parquet").read_bytes()
        assert predictions == (alone / "predictions.parquet").read_bytes()


def test_every_row_is_predicted_once_and_tallies_are_of_the_predictions(dataset, trained, alone):
    import pyarrow.parquet

    index = open_index(dataset)
    table = pyarrow.parquet.read_table(alone / "predictions.parquet")
    assert table["row"].to_pylist() == index.rows_of("test").tolist()
    assert table["id"].to_pylist() == [index.ids[row].as_py() for row in index.rows_of("test")]
    names = np.array(index.classes)
    for view, tally in read_tallies(alone).items():
        assert tally.shape == Shape(4, 3)
        for k in range(3):
            for d in range(3):
                chosen = (np.array(table["label"]) == names[k]) & (np.array(table[f"decision.{view}"]) == names[d])
                assert tally.confusion[:, k, d].sum() == chosen.sum()
    p = np.stack([table[f"p.{name}"].to_numpy() for name in index.classes], 1)
    np.testing.assert_allclose(p.sum(1), 1)


def test_logits_are_those_of_the_model_on_each_image_alone(dataset, trained, alone):
    import pyarrow.parquet

    model = checkpoint.load_model(trained / "model", CPU).model
    index = open_index(dataset)
    table = pyarrow.parquet.read_table(alone / "predictions.parquet")
    reader = Reader(index)
    for place in (0, 17, 36):
        image = centred(decode(reader.read(int(index.rows_of("test")[place]))), 12).transpose(2, 0, 1)
        with torch.inference_mode():
            expected = model(torch.from_numpy(image.copy())[None])[0].numpy()
        found = [table[f"logit.{name}"][place].as_py() for name in index.classes]
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_the_views_differ_as_their_definitions_do(dataset, trained, alone):
    import pyarrow.parquet

    ledger = checkpoint.load_model(trained / "model", CPU).ledger
    table = pyarrow.parquet.read_table(alone / "predictions.parquet")
    logits = np.stack([table[f"logit.{name}"].to_numpy() for name in ledger.classes], 1)
    names = np.array(ledger.classes)
    np.testing.assert_array_equal(table["decision.argmax"], names[logits.argmax(1)])
    decisions = ledger.decide(ledger.log_probabilities(logits))
    np.testing.assert_array_equal(table["decision.ledger"], names[decisions])


def test_evaluation_leaves_the_model_as_it_was(dataset, trained):
    config = checkpoint.load_model(trained / "model", CPU).config
    model = config.model.build(3, 0).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    index = open_index(dataset)
    evaluate.logits_of(model, index, config.data, index.rows_of("test"), Local(trained, CPU))
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
