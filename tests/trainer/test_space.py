"""The settings of a search: ranges, and what is found wrong before anything runs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_loaders.faults import Refusal
from data_loaders.settings import dump, parse, parse_text
from trainer.metrics.catalogue import FAIRNESS, RATES, better
from trainer.metrics.tally import Shape, Tally
from trainer.space import OBJECTIVES, Integer, LogUniform, Search, Tuning, Uniform, applied, read_range

DATA = ["data.path=x"]
reals = st.floats(1e-300, 1e300)


@given(st.tuples(reals, reals).filter(lambda pair: pair[0] < pair[1]))
def test_a_range_reads_as_it_is_written(ends):
    for kind in (Uniform, LogUniform):
        assert read_range(str(kind(*ends))) == kind(*ends)
    assert read_range("integer(-3, 8)") == Integer(-3, 8)
    assert str(read_range("choice(a, [16, 32], 3e-4, no)")) == "choice(a, [16, 32], 3e-4, no)"


@pytest.mark.parametrize(
    "text",
    ["", "uniform", "uniform(1)", "uniform(2, 1)", "uniform(1, 1)", "uniform(nan, 1)", "uniform(a, b)", "normal(0, 1)"],
)
def test_what_is_no_range_is_refused(text):
    with pytest.raises(Refusal):
        parse(Tuning, [*DATA, f"search.space.model.dropout={text}"])


@pytest.mark.parametrize(
    "text", ["log_uniform(0, 1)", "integer(1, 2.5)", "choice(a)", "choice(a, a)", "choice([a, b)", 7, None]
)
def test_what_is_no_range_is_refused_wherever_it_comes_from(text):
    with pytest.raises(ValueError):  # noqa: PT011
        read_range(text)


def test_a_search_reads_as_it_is_written_and_so_do_the_settings_of_its_trials():
    words = [*DATA, "search.space.model.widths=choice([16, 32], [8])", "search.space.optimizer.lr=log_uniform(1e-3, 1)"]
    tuning = parse(Tuning, words)
    assert parse_text(Tuning, dump(tuning)) == tuning
    config = applied(tuning.training(), {"model.widths": "[16, 32]", "optimizer.lr": 0.02})
    assert config.model.model_dump()["widths"] == (16, 32)
    assert config.optimizer.lr == 0.02
    assert config.tracking.group == "search"


def test_every_wrong_path_value_and_objective_is_found_in_one_pass(tmp_path):
    file = tmp_path / "search.yaml"
    file.write_text(
        "data: {path: x}\nsearch:\n  objective: recal\n  space:\n    penalties.l3: uniform(0, 1)\n"
        "    model.dropout: uniform(0, 1.5)\n    name: choice(a, b)\n"
    )
    with pytest.raises(Refusal) as refusal:
        parse(Tuning, [str(file), "train.members=3"])
    said = {fault.where: f"{fault.what} {fault.fix}" for fault in refusal.value.faults}
    assert "did you mean l2 or l1" in said[f"{file}:5:19"]
    assert "should be less than 1, not 1.5" in said[f"{file}:6:20"]
    assert "nothing to search" in said[f"{file}:7:11"]
    assert "did you mean recall" in said[f"{file}:3:14"]
    assert "single models" in said[["train.members", "3"][0]]


def test_two_dashes_before_a_setting_are_welcome_and_alone_mean_true():
    assert parse(Tuning, ["--data.path=x", "--resume"]).resume
    assert not parse(Tuning, ["--data.path=x"]).resume


def tally(seed: int = 0) -> Tally:
    random = np.random.default_rng(seed)
    shape = Shape(4, 3)
    vector = random.integers(1, 50, shape.size)
    return Tally.of(vector, shape)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_is_one_number_with_a_direction(name):
    search = Search(objective=name)
    value = search.score(0.5, tally())
    assert np.isfinite(value)
    if name in (*RATES, *FAIRNESS):
        assert search.mode == {"higher": "max", "lower": "min"}[better(name)]
    else:
        assert (value, search.mode) == (0.5, "min")


def test_a_class_that_is_never_called_has_the_worst_precision_of_all():
    confusion = np.zeros((1, 3, 3), np.int64)
    confusion[0, :, 0] = 870, 104, 26  # all is called the majority
    t = Tally(confusion, *Tally.of(np.zeros(Shape(1, 3).size, np.int64), Shape(1, 3)).parts[1:])
    for name in ("precision", "worst_precision"):
        assert Search(objective=name).score(0, t) == 0
    assert Search(objective="macro_precision").score(0, t) == pytest.approx(0.87 / 3)
    for name in ("macro_precision", "worst_precision"):
        assert np.isnan(Search(objective=name).score(0, t - t))


def test_a_fraction_where_a_whole_number_is_wanted_and_what_all_trials_share_are_refused():
    words = ["search.space.data.batch=uniform(16, 128)", "search.space.train.members=choice(1, 3)"]
    with pytest.raises(Refusal) as refusal:
        parse(Tuning, [*DATA, *words, "search.space.data.validation=choice(val, test)", "cluster.on=local"])
    assert {fault.where.split("=")[0] for fault in refusal.value.faults} == {
        "cluster.on",
        "search.space.data.batch",
        "search.space.data.validation",
        "search.space.train.members",
    }
    with pytest.raises(Refusal, match=r"give a space without data\.sampler\.temper"):
        parse(Tuning, [*DATA, "data.sampler.kind=undersampled"])


def test_an_objective_by_class_is_that_of_the_worst_class_and_nan_where_nothing_was_counted():
    t = tally()
    recalls = RATES["recall"].value(t.overall())[0]
    assert Search(objective="recall").score(0, t) == recalls.min()
    empty = Tally.of(np.zeros(Shape(4, 3).size, np.int64), Shape(4, 3))
    assert np.isnan(Search(objective="worst_recall").score(0, empty))
