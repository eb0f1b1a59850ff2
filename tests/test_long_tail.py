"""The benchmark of methods for long tails: its words, and its table of one small run."""

from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow.parquet
import pytest
from sklearn.metrics import accuracy_score, confusion_matrix, log_loss

from benchmarks.long_tail import AFTER, Case, LongTail, Method, is_done, measure, run, work
from data_loaders.settings import parse
from trainer.config import Config
from trainer.model import CifarResNet
from trainer.optimizer import Steps

ROOT = Path(__file__).parent.parent
METHODS: tuple[Method, ...] = get_args(Method)


@pytest.fixture(scope="module")
def settings(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> LongTail:
    """Of one run on 154 images, which is done."""
    configs, out = ROOT / "jobs" / "configs" / "cifar10_lt", tmp_path_factory.mktemp("long_tail")
    settings = LongTail(data=dataset, out=out, configs=configs, methods=("ce",), seeds=1)
    settings.folder(Case("ce", 0)).parent.mkdir()
    assert work(settings, Case("ce", 0)) is None
    return settings


@pytest.mark.parametrize("configs", ["cifar10_lt", "cifar100_lt"])
def test_methods_differ_in_what_is_learnt_and_share_the_short_schedule(configs: str):
    folder = ROOT / "jobs" / "configs" / configs
    assert {path.stem for path in folder.glob("*.yaml")} == set(METHODS)
    short, full = (LongTail(data=Path("d"), configs=folder, schedule=which) for which in ("short", "full"))
    quick, whole = ([parse(Config, s.words(Case(one, 2))) for one in METHODS] for s in (short, full))
    assert {config.seed for config in quick + whole} == {2}
    depths = [{c.model.depth for c in which if isinstance(c.model, CifarResNet)} for which in (quick, whole)]
    assert depths == [{8}, {32}]
    assert all(config.optimizer.schedule == Steps(factor=0.1) for config in quick)
    first = [config for config, method in zip(quick, METHODS, strict=True) if method not in AFTER]
    assert len({(config.train, config.data.batch, config.optimizer.lr) for config in first}) == 1
    assert len({config.identity for config in quick}) == len({config.identity for config in whole}) == len(METHODS)


def test_a_second_stage_starts_from_the_first_one_of_its_seed():
    for method, first in AFTER.items():
        settings = LongTail(data=Path("d"))
        config = parse(Config, settings.words(Case(method, 1)))
        assert config.model.weights == settings.folder(Case(first, 1)).resolve() / "model"
        assert METHODS.index(method) > METHODS.index(first)


def test_a_run_is_measured_as_scikit_learn_does(settings: LongTail):
    folder = settings.folder(Case("ce", 0))
    found = measure(folder)
    table = pyarrow.parquet.read_table(folder / "evaluation" / "test" / "predictions.parquet").to_pandas()
    for view in ("argmax", "ledger"):
        labels, decided = table["label"], table[f"decision.{view}"]
        hits = confusion_matrix(labels, decided, labels=list(found.classes), normalize="true").diagonal()
        assert found.values[f"{view} top-1"] == pytest.approx(100 * accuracy_score(labels, decided))
        assert [found.values[f"{view} {part}"] for part in ("many", "medium", "few")] == pytest.approx(100 * hits)
        assert found.values[f"{view} worst"] == pytest.approx(100 * hits.min())


def test_the_natural_nll_is_that_of_probabilities_and_rows_as_frequent_as_in_training(settings: LongTail):
    folder = settings.folder(Case("ce", 0))
    found = measure(folder)
    table = pyarrow.parquet.read_table(folder / "evaluation" / "test" / "predictions.parquet").to_pandas()
    names = sorted(found.classes)
    index = parse(Config, [str(folder / "config.yaml")]).data.index()
    natural = np.bincount(index.labels[index.rows_of("train")]) / len(index.rows_of("train"))
    even = table[[f"p.{name}" for name in names]].to_numpy()
    p = even * natural / (even * natural).sum(1, keepdims=True)
    each = 1 / table["label"].map(table["label"].value_counts())
    share = table["label"].map(dict(zip(names, natural, strict=True))) * each
    expected = [log_loss(table["label"], q, sample_weight=w) for q, w in ((even, each), (p, share))]
    assert [found.values[f"ledger NLL{which}"] for which in ("", ", natural")] == pytest.approx(expected, rel=1e-5)


def test_what_is_done_is_shown_and_not_done_again(settings: LongTail, capsys: pytest.CaptureFixture[str]):
    log = settings.folder(Case("ce", 0)).with_suffix(".log")
    before = log.read_text()
    run(settings)
    assert log.read_text() == before
    top = measure(settings.folder(Case("ce", 0))).values["argmax top-1"]
    assert f"| ce | 74,835 | 1 | {top:.1f} |" in capsys.readouterr().out


def test_a_run_of_other_settings_is_not_taken_for_done(settings: LongTail, tmp_path: Path):
    (tmp_path / "ce.yaml").write_text((settings.configs / "ce.yaml").read_text().replace("lr: 0.1", "lr: 0.2"))
    assert is_done(settings, Case("ce", 0))
    assert not is_done(settings.model_copy(update={"configs": tmp_path}), Case("ce", 0))
    assert not is_done(settings, Case("drs", 0))
