"""Every kind of sampler, over the same data."""

from collections.abc import Sequence
from itertools import product
from math import sqrt
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_loaders.faults import Refusal
from data_loaders.index import Index, open_index
from data_loaders.loader import Data
from data_loaders.sampler import (
    AnyMix,
    AnySampler,
    Deferred,
    EffectiveNumber,
    GroupConditional,
    Joint,
    Progressive,
    RepeatFactor,
    Stratified,
    TicketSampler,
    Undersampled,
)
from data_loaders.settings import dump, parse, parse_text, variants
from data_loaders.stream import Strata, apportion, tickets

FAR = 3000
"""Positions of a run, in the tests over all kinds."""
SHARES = {"dessert": {"home": 0.2, "street": 0.1}, "drink": {"home": 0.15, "street": 0.25}, "food": {"street": 0.3}}
MIXES = [
    Stratified(),
    Stratified(temper=1),
    Stratified(temper=0.5, by="label_and_group"),
    Stratified(temper=0.3, by="group", columns=("venue",)),
    Undersampled(),
    Undersampled(by="label_and_group", columns=("venue",), keep=5),
    Undersampled(redraw=True),
    Undersampled(redraw=True, by="group", keep=3),
    EffectiveNumber(beta=0.9),
    RepeatFactor(threshold=0.5),
    GroupConditional(),
    GroupConditional(temper=0, columns=("venue",)),
    Joint(columns=("venue",), shares=SHARES),
]
SCHEDULES = [
    Progressive(),
    Progressive(by="label_and_group", columns=("camera",)),
    Deferred(),
    Deferred(first=Undersampled(redraw=True), then=Joint(columns=("venue",), shares=SHARES), after=0.31),
]
every_mix = pytest.mark.parametrize("settings", MIXES, ids=repr)
every_sampler = pytest.mark.parametrize("settings", MIXES + SCHEDULES, ids=repr)


def made(labels: Sequence[int] | np.ndarray, venues: Sequence[int] | np.ndarray = ()) -> Any:
    """What samplers ask of an index: rows with these labels and, in the one group column, these values."""
    labels, venues = np.asarray(labels), np.asarray(venues, np.int64)
    names = {"venue": tuple(f"v{v}" for v in range(venues.max() + 1))} if len(venues) else {}
    groups = venues.reshape(len(labels), -1)
    classes = tuple(f"c{k}" for k in range(labels.max() + 1))
    return SimpleNamespace(label=labels, labels=labels, group=[*groups.T], group_values=names, classes=classes)


def rows_of(index: Any) -> np.ndarray:
    return np.arange(len(index.labels))


def sizes(*counts: int) -> np.ndarray:
    """Labels of so many rows of each class."""
    return np.repeat(np.arange(len(counts)), counts)


@pytest.fixture(scope="module")
def index(dataset: Path) -> Index:
    return open_index(dataset)


@pytest.fixture(scope="module")
def rows(index: Index) -> np.ndarray:
    return index.rows_of("train")


def test_every_kind_is_here():
    assert {type(s) for s in MIXES} == set(variants(AnyMix))
    assert {type(s) for s in MIXES + SCHEDULES} == set(variants(AnySampler))


@every_sampler
def test_a_row_is_a_function_of_its_position_alone(settings, index, rows):
    stream = settings.over(index, rows, 3, FAR)
    whole = stream.rows(np.arange(FAR))
    assert set(whole.tolist()) <= set(rows.tolist())
    some = np.random.default_rng(0).integers(0, FAR, 200)
    np.testing.assert_array_equal(settings.over(index, rows, 3, FAR).rows(some), whole[some])
    for step in (0, 7, 150):  # a resume is a slice
        np.testing.assert_array_equal(stream.rows(np.arange(step * 16, step * 16 + 16)), whole[step * 16 :][:16])
    assert (settings.over(index, rows, 4, FAR).rows(np.arange(FAR)) != whole).any()


@every_sampler
def test_what_is_counted_is_what_is_drawn(settings, index, rows):
    stream = settings.over(index, rows, 3, FAR)
    for start, stop in [(0, FAR), (0, 7), (5, 300), (1000, 1000), (11, 2 * FAR), (FAR, FAR + 500)]:
        drawn = index.labels[stream.rows(np.arange(start, stop))]
        np.testing.assert_array_equal(stream.counts(start, stop), np.bincount(drawn, minlength=len(index.classes)))


@every_sampler
def test_phases_begin_at_0_and_follow_one_another_within_the_run(settings, index, rows):
    phases = settings.over(index, rows, 3, FAR).phases
    assert phases[0] == 0
    assert list(phases) == sorted(set(phases))
    assert phases[-1] < FAR
    assert (len(phases) > 1) == (type(settings) not in variants(AnyMix))


@every_mix
def test_every_cycle_has_each_stratum_to_within_a_draw_of_its_share(settings, index, rows):
    stream = settings.over(index, rows, 3)
    strata = stream.strata
    weights = settings.weights(strata, index)
    stratum = np.full(len(index.labels), -1)
    stratum[strata.rows] = np.repeat(np.arange(len(strata.sizes)), strata.sizes)
    assert stream.cycle <= len(rows)
    exact = stream.cycle * weights / weights.sum()
    cycles = 2 * len(stream.tickets) + 1
    drawn = stratum[stream.rows(np.arange(cycles * stream.cycle))].reshape(cycles, -1)
    counts = np.array([np.bincount(cycle, minlength=len(strata.sizes)) for cycle in drawn])
    assert (np.abs(counts - exact) < 1 + 1e-6).all()
    in_turn = len(stream.tickets)
    assert (np.abs(counts[:in_turn].sum(0) - in_turn * exact) < 1 + 1e-6).all()
    np.testing.assert_array_equal(counts[:in_turn], counts[in_turn : 2 * in_turn])
    assert ((counts.sum(0) > 0) == (weights > 0)).all()


@every_mix
def test_the_rows_of_a_stratum_repeat_evenly_unless_they_are_drawn_anew(settings, index, rows):
    stream = settings.over(index, rows, 3)
    for cycles in (1, 20, 41):
        times = np.bincount(stream.rows(np.arange(cycles * stream.cycle)), minlength=len(index.labels))
        uneven = max(np.ptp(part) for part in np.split(times[stream.strata.rows], stream.strata.first[1:]))
        assert uneven <= 1 or settings.redraw


@every_sampler
def test_settings_survive_yaml(settings):
    data = Data(path=Path("data"), sampler=settings)
    assert parse_text(Data, dump(data)) == data


@pytest.mark.parametrize(
    "settings",
    [Stratified(temper=0.5), EffectiveNumber(), RepeatFactor(), Undersampled(redraw=True), Progressive(), Deferred()],
    ids=repr,
)
def test_of_a_thousand_classes_one_with_a_single_row_is_drawn_as_often_as_is_due(settings):
    index = made(sizes(*(k % 20 + 2 for k in range(999)), 1))
    n = len(index.labels)
    stream = settings.over(index, rows_of(index), 0, 4 * n)
    drawn = np.bincount(index.labels[stream.rows(np.arange(2 * n))], minlength=1000)
    np.testing.assert_array_equal(stream.counts(0, 2 * n), drawn)
    assert drawn[999] >= 1
    assert drawn.all()


def test_more_than_2_to_the_24_rows_need_no_table_of_draws():
    index = made(np.append(np.zeros(2**24, np.int64), [1, 1, 1]))
    n = 2**24 + 3
    stream = Progressive().over(index, rows_of(index), 0, 3 * n)
    assert stream.phases == (0, n, 2 * n)
    assert stream.counts(0, n).tolist() == [2**24, 3]
    assert (np.abs(stream.counts(n, 2 * n) - np.array([2**24, 3]) / 2 - n / 4) < 1).all()
    assert np.ptp(stream.counts(2 * n, 3 * n)) == 1
    assert stream.rows(np.array([2 * n + 5])) < n


# The definitions


@given(st.lists(st.integers(1, 60), min_size=2, max_size=6), st.sampled_from([0.0, 0.5, 0.9, 0.99]))
def test_effective_number_is_a_weight_for_each_row_of_one_over_the_sum_of_powers(counts, beta):
    strata = Strata.of(np.arange(sum(counts)), sizes(*counts), sizes(*counts), len(counts))
    of_row = [1 / sum(beta**i for i in range(n)) for n in counts]  # eq. 1: 1 + beta + beta ** 2 …
    shares = EffectiveNumber(beta=beta).weights(strata, made(sizes(*counts)))
    np.testing.assert_allclose(shares / shares.sum(), np.multiply(counts, of_row) / np.dot(counts, of_row))


def test_effective_number_at_0_is_the_natural_order_and_near_1_the_balanced_one():
    index = made(sizes(30, 10, 5))
    natural, balanced = (EffectiveNumber(beta=b).over(index, rows_of(index), 0).tickets for b in (0, 1 - 1e-12))
    assert natural.tolist() == [[6, 2, 1]]
    assert np.ptp(balanced.sum(0)) <= 1


@given(st.lists(st.integers(1, 200), min_size=2, max_size=6), st.sampled_from([0.01, 0.2, 1.0]))
def test_repeat_factor_is_that_of_lvis(counts, threshold):
    labels = sizes(*counts)
    frequency = [n / len(labels) for n in counts]
    repeats = [max(1.0, sqrt(threshold / frequency[k])) for k in labels]  # of each image
    target = np.bincount(labels, repeats) / sum(repeats)
    index = made(labels)
    stream = RepeatFactor(threshold=threshold).over(index, rows_of(index), 0)
    np.testing.assert_allclose(stream.tickets.sum(0) / stream.tickets.sum(), target, rtol=0.011)


def test_group_conditional_keeps_the_classes_and_makes_the_groups_independent_of_them():
    labels, venues = sizes(60, 12, 24), np.concatenate([sizes(50, 10), sizes(2, 10), sizes(12, 12)])
    index = made(labels, venues)
    stream = GroupConditional().over(index, rows_of(index), 0)
    drawn = stream.rows(np.arange(2 * stream.cycle))
    table = np.zeros((3, 2), np.int64)
    np.add.at(table, (labels[drawn], venues[drawn]), 1)
    np.testing.assert_array_equal(table.sum(1) * 96, np.array([60, 12, 24]) * len(drawn))
    np.testing.assert_array_equal(table[:, 0], table[:, 1])


def test_group_conditional_shares_a_class_between_the_groups_that_occur_in_it():
    index = made(sizes(8, 4), [0, 0, 0, 1, 1, 1, 2, 2, 1, 1, 1, 1])
    assert GroupConditional().over(index, rows_of(index), 0).tickets.sum(0).tolist() == [2, 2, 3, 2]
    assert GroupConditional(temper=0).over(index, rows_of(index), 0).tickets.tolist() == [[1, 1, 3, 1]]


def test_a_joint_target_is_met_exactly_and_a_cell_without_a_share_never_drawn(index, rows):
    stream = Joint(columns=("venue",), shares=SHARES).over(index, rows, 0)
    assert stream.cycle == 20
    drawn = stream.rows(np.arange(200))
    for (k, label), (v, venue) in product(enumerate(index.classes), enumerate(index.group_values["venue"])):
        share = SHARES[label].get(venue, 0)
        assert ((index.labels[drawn] == k) & (index.groups[drawn, 0] == v)).sum() == round(200 * share)


def test_a_joint_target_over_several_columns_names_their_values(index, rows):
    cells = {(index.classes[index.labels[r]], index.groups[r].tolist()[0], index.groups[r].tolist()[1]) for r in rows}
    venue, camera = index.group_values.values()
    shares: dict[str, dict[str, float]] = {label: {} for label in index.classes}
    for label, v, c in cells:
        shares[label][f"{camera[c]}, {venue[v]}"] = 1 + (label == "food")
    stream = Joint(columns=("camera", "venue"), shares=shares).over(index, rows, 0)
    counts = stream.counts(0, stream.cycle)
    assert counts.tolist() == [sum(shares[label].values()) for label in index.classes]


def test_redrawing_takes_other_rows_of_the_majority_in_each_lap_and_none_twice_in_one():
    labels = sizes(40, 8, 20)
    index = made(labels)
    stream = Undersampled(redraw=True).over(index, rows_of(index), 0)
    laps = stream.rows(np.arange(300 * 24)).reshape(300, 24)
    for lap in laps:
        assert len(set(lap.tolist())) == 24
        assert np.bincount(labels[lap]).tolist() == [8, 8, 8]
    times = np.bincount(laps.ravel(), minlength=68)
    assert (times[40:48] == 300).all()
    assert (times > 0).all()
    assert np.ptp(times[:40]) > 1


# Schedules


def test_progressive_goes_from_natural_to_balanced_as_the_paper_says():
    labels = sizes(70, 20, 9, 1)
    index = made(labels)
    epochs = 6
    stream = Progressive().over(index, rows_of(index), 0, 100 * epochs)
    assert stream.phases == tuple(range(0, 600, 100))
    for t, first in enumerate(stream.phases):
        natural, balanced = np.array([0.7, 0.2, 0.09, 0.01]), np.full(4, 0.25)
        target = (1 - t / (epochs - 1)) * natural + t / (epochs - 1) * balanced
        drawn = np.bincount(labels[stream.rows(np.arange(first, first + 100))], minlength=4)
        assert (np.abs(drawn - 100 * target) < 1).all()
    assert sorted(stream.rows(np.arange(100))) == list(range(100))


def test_progressive_ends_balanced_in_an_epoch_that_is_cut_short_and_stays_so_after_the_run():
    index = made(sizes(90, 10))
    stream = Progressive().over(index, rows_of(index), 0, 260)
    assert stream.phases == (0, 100, 200)
    assert stream.counts(200, 600).tolist() == [200, 200]


def test_progressive_stays_natural_in_a_run_of_one_epoch():
    index = made(sizes(90, 10))
    assert Progressive().over(index, rows_of(index), 0, 100).counts(0, 100).tolist() == [90, 10]


def test_deferred_draws_the_one_mix_up_to_its_change_and_the_other_from_there():
    index = made(sizes(30, 6))
    rows = rows_of(index)
    deferred = Deferred(then=Undersampled(), after=0.5)
    stream = deferred.over(index, rows, 9, 144)
    assert stream.phases == (0, 72)
    np.testing.assert_array_equal(
        stream.rows(np.arange(72)), Stratified(temper=1).over(index, rows, 9).rows(np.arange(72))
    )
    then = stream.rows(np.arange(72, 144))
    assert index.labels[then].sum() == 36
    assert len(set(then[index.labels[then] == 0].tolist())) == 6
    assert stream.counts(70, 74).sum() == 4


def test_deferred_from_the_start_is_the_later_mix_alone():
    index = made(sizes(30, 6))
    stream = Deferred(after=0).over(index, rows_of(index), 0, 144)
    assert stream.phases == (0,)
    assert stream.counts(0, 100).tolist() == [50, 50]


@pytest.mark.parametrize("settings", SCHEDULES, ids=repr)
def test_a_schedule_without_an_end_is_refused(settings, index, rows):
    with pytest.raises(Refusal, match=f"'{settings.kind}' changes over a run, and its length is not known"):
        settings.over(index, rows, 0)


def test_a_foreign_loop_that_knows_its_epochs_may_have_a_schedule(dataset, index, rows):
    from data_loaders.torch import BalancedSampler, ShardDataset

    items = BalancedSampler(ShardDataset(dataset), sampler=Progressive(), epochs=3)
    drawn = [rows[list(items)] for _ in range(3)]
    np.testing.assert_array_equal(
        np.concatenate(drawn), Progressive().over(index, rows, 0, 3 * len(rows)).rows(np.arange(3 * len(rows)))
    )
    assert sorted(drawn[0]) == rows.tolist()
    with pytest.raises(Refusal, match="its length is not known"):
        BalancedSampler(ShardDataset(dataset), sampler=Progressive())


def test_phases_have_orders_of_their_own():
    index = made(sizes(50, 50))
    stream = Deferred(first=Stratified(), then=Stratified(), after=0.5).over(index, rows_of(index), 0, 200)
    assert (stream.rows(np.arange(100)) != stream.rows(np.arange(100, 200))).any()


# Quotas


weights = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12).map(np.array)


@given(weights, st.integers(1, 5000), st.integers(1, 9))
def test_apportioned_parts_add_up_and_are_within_one_of_their_shares_in_each_turn_and_over_all(weights, total, turns):
    parts = apportion(weights, total, turns)
    assert (parts.sum(1) == total).all()
    exact = total * weights / weights.sum()
    assert (np.abs(parts - exact) < 1 + 1e-5).all()
    assert (np.abs(parts.sum(0) - turns * exact) < 1 + 1e-5).all()


@given(weights, st.integers(1, 5000))
def test_cycles_that_take_turns_give_every_stratum_its_share_to_within_a_percent(weights, rows):
    dealt = tickets(weights, rows)
    np.testing.assert_allclose(dealt.sum(0) / dealt.sum(), weights / weights.sum(), rtol=0.011)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.sampled_from([1, 0.01, 0.5, 1 / 3, 7.0]))
def test_a_cycle_of_simple_ratios_is_exact_and_as_short_as_can_be(ratios, unit):
    dealt = tickets(np.array(ratios) * unit, 1000)
    assert dealt.tolist() == [(np.array(ratios) // np.gcd.reduce(ratios)).tolist()]


def test_a_cycle_that_would_be_exact_only_after_many_epochs_is_one_epoch():
    assert tickets(np.array([143.0, 91.0, 77.0]), 311).tolist() == [[143, 91, 77]]
    assert (tickets(np.array([143.0, 91.0, 77.0]), 300).sum(1) == 300).all()


# What is refused


def test_unknown_classes_and_groups_and_empty_cells_of_a_joint_target_are_all_named_at_once(index, rows):
    shares = {"desert": {"home": 1.0}, "drink": {"hom": 1.0}, "food": {"street": 1e-12, "home": 0.5}}
    street = rows[(index.labels[rows] != 2) | (index.groups[rows, 0] == 1)]
    with pytest.raises(Refusal) as refusal:
        Joint(columns=("venue",), shares=shares).over(index, street, 0)
    said = str(refusal.value)
    assert "shares.desert: no class 'desert' — did you mean dessert?" in said
    assert "shares.drink.hom: no group 'hom' — did you mean home?" in said
    assert "shares.food.home: no training row of 'food' in 'home'" in said
    assert "shares.food.street: 1e-12 is less than 1e-09 of all" in said
    assert "class 'dessert' is never drawn" in said


def test_a_share_of_0_needs_no_row(index, rows):
    shares = {"dessert": {"home": 1.0}, "drink": {"home": 1.0}, "food": {"home": 0.0, "street": 1.0}}
    street = rows[(index.labels[rows] != 2) | (index.groups[rows, 0] == 1)]
    assert Joint(columns=("venue",), shares=shares).over(index, street, 0).counts(0, 30).tolist() == [10, 10, 10]


@pytest.mark.parametrize(
    "settings", [GroupConditional(), Joint(shares={"c0": {"a": 1}}), Stratified(by="group")], ids=repr
)
def test_groups_of_data_without_a_group_column_are_refused(settings):
    index = made(sizes(3, 3))
    with pytest.raises(Refusal, match="groups need a group column"):
        settings.over(index, rows_of(index), 0)


@every_sampler
def test_a_class_without_rows_is_named_by_every_sampler(settings, index, rows):
    with pytest.raises(Refusal, match="no training row of 'drink'"):
        settings.over(index, rows[index.labels[rows] != 1], 0, FAR)


def test_shares_are_set_from_the_command_line():
    words = ["path=x", "sampler.kind=joint", "sampler.shares.food.street=0.3", "sampler.shares.drink.home=0.7"]
    sampler = parse(Data, words).sampler
    assert isinstance(sampler, Joint)
    assert sampler.shares == {"food": {"street": 0.3}, "drink": {"home": 0.7}}


def test_the_natural_order_of_groups_is_counted_without_drawing_it():
    index = made(sizes(500, 300), np.arange(800) % 3)
    stream = Stratified(by="group", temper=1).over(index, rows_of(index), 0)
    assert isinstance(stream, TicketSampler)
    assert stream.counts(0, 800 * 10**7).tolist() == [500 * 10**7, 300 * 10**7]
