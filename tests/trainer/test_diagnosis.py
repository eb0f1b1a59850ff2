from typing import get_args

import numpy as np
import pytest

from data_loaders.audit.finding import Bias, Finding
from data_loaders.settings import parse
from trainer.config import Config
from trainer.diagnosis import ADVICE, MEANINGS, diagnose, summary

BIASES = get_args(Bias)
COMMANDS = dict.fromkeys(BIASES, "python -m jobs.audit")


def finding(bias: Bias, text: str = "it is so") -> Finding:
    return Finding(bias, "desserts", text, 0.5, 0.4, 0.6, np.nan, 100)


def test_every_bias_has_a_meaning_and_a_remedy_and_there_is_an_order_to_mend_them():
    assert set(MEANINGS) == set(ADVICE) == set(BIASES)
    assert all(ADVICE.values())
    assert next(iter(MEANINGS)) == "leakage"


@pytest.mark.parametrize("settings", [a.settings for advice in ADVICE.values() for a in advice if a.settings])
def test_every_setting_that_is_advised_exists_and_is_accepted(settings):
    sizes = ["data.size=64"]
    assert parse(Config, ["data.path=nowhere", *sizes, *settings])


def test_a_diagnosis_tells_what_was_found_what_was_not_and_what_was_not_looked_for():
    looked: set[Bias] = {"feature", "spatial", "decision"}
    verdicts = diagnose([finding("decision", "argmax costs 0.2 more"), finding("feature")], looked, COMMANDS, {})
    assert [v.bias for v in verdicts if v.findings] == ["feature", "decision"]
    assert [v.bias for v in verdicts if v.looked and not v.findings] == ["spatial"]
    text = summary(verdicts)
    assert "DECISION" in text
    assert "argmax costs 0.2 more" in text
    assert "decision.costs.kind=balanced" in text
    assert "not found: spatial" in text
    assert text.count("not looked for: ") == len(BIASES) - 3
    assert all(not v.command for v in verdicts if v.looked)


def test_many_findings_of_a_bias_are_counted_and_not_all_told():
    text = summary(diagnose([finding("selection", f"finding {i}") for i in range(9)], {"selection"}, COMMANDS, {}))
    assert "finding 3" in text
    assert "finding 4" not in text
    assert "and 5 more" in text


def test_what_the_run_does_already_is_not_advised():
    done = {"decision.costs.kind": "balanced", "decision.prior": "natural", "train.epochs": 100.0, "train.members": 5}
    found = [finding("decision"), finding("score")]
    advised = [
        a.settings for v in diagnose(found, {"decision", "score"}, COMMANDS, done) for a in v.advice if a.settings
    ]
    assert advised == [("data.sampler.temper=0",)]
