"""Ten thousand damaged data sets, each of them read by our reader and by the independent one."""

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import corruption
from benchmarks.checksum_cost import Unchecked
from benchmarks.corruption import SUBJECTS, Subject, corrupt, ours, table
from benchmarks.mutations import EDITS, OLDER, REGIONS, REPLACED
from tests.independent_reader import Row

MUTATIONS = 10_000


def test_no_damage_is_ever_read_as_if_it_were_sound():
    found = corrupt(range(MUTATIONS))
    outcomes = Counter((f.subject, f.outcome) for f in found)
    assert {outcome for _, outcome in outcomes} == {"harmless", "older", "detected"}, table(found)
    for subject in SUBJECTS:
        assert sum(n for (name, _), n in outcomes.items() if name == subject.name) == MUTATIONS
        assert outcomes[subject.name, "detected"] > 0.75 * MUTATIONS, table(found)
    tried = {(f.mutation.target.region, f.mutation.kind) for f in found}
    assert tried == {(r, k) for r in REGIONS for k in (*EDITS, *REPLACED, OLDER)} - {("shard", OLDER)}
    assert {f.mutation.kind for f in found if f.outcome == "older"} <= {OLDER, "swapped"}


def credulous(folder: Path, generation: int | None, shards: set[str] | None) -> Iterator[Row | None]:
    """Our reader without the checksum of rows."""
    checked, corruption.Reader = corruption.Reader, Unchecked
    try:
        yield from ours(folder, generation, shards)
    finally:
        corruption.Reader = checked


def falling(*_) -> Iterator[Row | None]:
    os.kill(os.getpid(), signal.SIGSEGV)
    yield None


def raising(*_) -> Iterator[Row | None]:
    yield None
    raise IndexError


def waiting(*_) -> Iterator[Row | None]:
    time.sleep(60)
    yield None


def outcomes(read: corruption.Read, mutations: int) -> Counter[str]:
    return Counter(f.outcome for f in corrupt(range(mutations), 0, (Subject("", read, (Exception,)), *SUBJECTS[1:])))


def test_a_reader_without_checksums_is_found_out():
    found = outcomes(credulous, 100)
    assert found["silent"] > 20


def test_the_death_of_a_reader_is_counted_and_the_run_goes_on():
    assert outcomes(falling, 3) == {"crash": 3}


def test_an_error_that_no_reader_promises_is_a_crash():
    found = corrupt(range(3), 0, (Subject("", raising, (OSError,)),))
    assert [f.outcome for f in found] == ["crash"] * 3


def test_a_reader_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(corruption, "LIMIT_S", 0.5)
    assert outcomes(waiting, 1) == {"hang": 1}


def test_a_run_is_a_function_of_its_seed():
    assert corrupt(range(40), 3) == corrupt(range(20), 3) + corrupt(range(20, 40), 3)
    assert [f.mutation for f in corrupt(range(20), 4)] != [f.mutation for f in corrupt(range(20), 3)]
