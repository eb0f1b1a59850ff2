"""Hostile images, in a process of their own: none may crash it, hang it or swell it, and each refusal is a sentence."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("hostile.py")
SECONDS = 2.0
"""Of processor time, that a call may take."""
MEMORY = 512 * 10**6
"""Bytes by which the process may grow."""
SENTENCE = re.compile(r"(is|has|claims|does) [^\n<>]{5,110}")
NEAR = 6
"""By which a colour may be off: what JPEG leaves of it."""

spec = importlib.util.spec_from_file_location("hostile", SCRIPT)
assert spec is not None
assert spec.loader is not None
hostile = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hostile)
CASES = {case.name: case for case in hostile.cases()}
Told = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Told]:
    """What became of every case and of images with a bit turned over: name -> call -> its size or refusal."""
    folder = tmp_path_factory.mktemp("hostile")
    names = []
    for name, content in [*((c.name, c.content) for c in CASES.values()), *hostile.flips(0)]:
        (folder / f"{len(names):04d}").write_bytes(content)
        names.append(name)
    run = subprocess.run(
        [sys.executable, "-W", "error", SCRIPT, folder],
        env={"PYTHONPATH": str(SCRIPT.parents[2])},
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert run.returncode == 0, (names[int(lines[-1]["case"])], lines[-1], run.stderr)
    found: dict[str, Told] = {name: {} for name in names}
    for line in lines:
        found[names[int(line["case"])]][line["call"]] = line
    return found


def test_the_cases_are_many():
    assert len(CASES) > 200
    assert sum(bool(case.refusal) for case in CASES.values()) > 80


@pytest.mark.parametrize("name", CASES)
def test_each_becomes_what_is_foretold(name: str, told: dict[str, Told]):
    case = CASES[name]
    for call, line in told[name].items():
        if case.size == (0, 0):
            assert "refusal" in line or (case.deep and call == "header"), call
            assert line.get("refusal", case.refusal).startswith(case.refusal), call
            continue
        assert "refusal" not in line, (call, line["refusal"])
        assert tuple(line["size"]) == case.size or call in {"resize", "raw"}, call
        assert max(line["size"]) <= 16 or call not in {"resize", "raw"}
        for expected, colour in zip(
            case.corners, line.get("corners", []), strict=call == "decode" and bool(case.corners)
        ):
            assert max(abs(a - b) for a, b in zip(expected, colour, strict=True)) <= NEAR, (
                case.corners,
                line["corners"],
            )


def test_an_image_with_a_bit_turned_over_is_an_image_or_refused(told: dict[str, Told]):
    lines = [line for name in told if name not in CASES for line in told[name].values()]
    assert len(lines) == 200 * len(hostile.CALLS)
    assert {"size" in line or "refusal" in line for line in lines} == {True}


def test_no_call_takes_seconds_and_none_swells(told: dict[str, Told]):
    lines = [line for calls in told.values() for line in calls.values()]
    assert max(line["seconds"] for line in lines) < SECONDS
    assert max(line["peak"] for line in lines) - lines[0]["peak"] < MEMORY


def test_every_refusal_is_a_short_plain_sentence(told: dict[str, Told]):
    refusals = {line["refusal"] for calls in told.values() for line in calls.values() if "refusal" in line}
    assert [refusal for refusal in refusals if not SENTENCE.fullmatch(refusal)] == []
    assert len(refusals) > 30
