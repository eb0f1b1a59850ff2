import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jinja2 import Environment, PackageLoader
from markupsafe import escape

from data_loaders import durable
from data_loaders.audit.audit import Asked, audit
from data_loaders.audit.coverage import Reference
from data_loaders.audit.finding import Finding
from data_loaders.audit.summary import plain, to_json
from data_loaders.faults import Refusal
from data_loaders.index import open_index
from trainer.decision import analysis
from trainer.decision.ledger import Decision
from trainer.decision.validation import Validation
from trainer.diagnosis import MEANINGS, diagnose
from trainer.metrics.catalogue import recall
from trainer.metrics.groups import groupings
from trainer.metrics.tally import BINS, HALVINGS, SCALE, Tally
from trainer.mitigation import Effect, Remedy
from trainer.probe.paired import Number
from trainer.report.audits import ShownAudit, _properties, _skills
from trainer.report.figures import confusion, reliability
from trainer.report.page import EvaluatedRun, read_run, write
from trainer.report.tables import LEAST_N, Subject, fits, recall_gain, summary

HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(2)">'
CLASSES = ("food", "drink", HOSTILE)
FACTS = {"validation": {"n": 30, "nll": 0.7, "nll_calibrated": 0.6}, "warnings": [HOSTILE]}


def subject(seed: int = 0, run: str = "run", view: str = "ledger") -> Subject:
    random = np.random.default_rng(seed)
    confusion = random.integers(0, 30, (4, 3, 3)) + 20 * np.eye(3, dtype=np.int64)
    confusion[1, 2] = [3, 0, 0]  # a cell too small to be named the worst
    n = confusion.sum(2)
    confidence = np.zeros((4, 3, BINS, 3), np.int64)
    at = HALVINGS + 48
    confidence[:, :, at, 0], confidence[:, :, at, 1] = n, np.diagonal(confusion, axis1=1, axis2=2)
    confidence[:, :, at, 2] = (n * 0.81 * SCALE).astype(np.int64)
    scores = np.zeros((4, 3, 2, 2), np.int64)
    scores[..., 0] = (n[..., None] * 0.5 * SCALE).astype(np.int64)
    scores[..., 1] = (n[..., None] * 0.5 * SCALE).astype(np.int64)
    prior = np.array([0.7, 0.2, 0.1])
    ledger = Decision().ledger(CLASSES, prior, prior, prior)
    values = {"venue": ("home", HOSTILE), "camera": ("phone", "slr")}
    return Subject(run, "test", view, Tally(confusion, confidence, 0 * confidence, scores), ledger, values)


class Elements(HTMLParser):
    """All tags and attributes of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def analysed() -> dict[str, Any]:
    """What decisions on a few rows cost."""
    random = np.random.default_rng(0)
    labels, cells = np.repeat([0, 1, 2], [40, 20, 10]), random.integers(0, 4, 70)
    logits = random.normal(0, 1, (70, 3)) + np.eye(3)[labels]
    s = subject()
    ledger = replace(s.ledger, classes=(HOSTILE, *CLASSES[1:]))
    said = Validation(logits, labels, cells, np.arange(70))
    return analysis.to_json(analysis.analyse(ledger, logits, labels, cells, list(groupings(s.group_values)), said))


def subjects(run: str) -> list[Subject]:
    """Of the training split and of a test split, under both views."""
    trained = [replace(subject(5, run, view), split="train") for view in ("argmax", "ledger")]
    return trained + [subject(0, run, view) for view in ("argmax", "ledger")]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("report") / "report.html"
    runs = [
        EvaluatedRun(name, "train", FACTS, subject().ledger, subjects(name), {"test": analysed()})
        for name in ("natural", HOSTILE)
    ]
    found = Finding("spatial", HOSTILE, HOSTILE, 0.1, 0.05, 0.2, np.nan, 30)
    verdicts = plain(diagnose([found], {"spatial"}, dict.fromkeys(MEANINGS, HOSTILE), {}))
    number = Number(0.1, 0.05, 0.2, 30)
    effects = [Effect("all", HOSTILE, HOSTILE, number, 0.01, number, 0.01, "helps and harms")]
    remedies = [plain(Remedy("test", "natural, argmax", HOSTILE, [f"name: {HOSTILE}"], effects))]
    write([run._replace(diagnosis=verdicts) for run in runs], out, remedies)
    json.loads(out.with_suffix(".json").read_text())
    return out.read_text()


def test_a_hostile_name_runs_nothing_and_loads_nothing(page):
    elements = Elements(page).found
    scripts = [attributes for tag, attributes in elements if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "data"}]
    assert not [tag for tag, _ in elements if tag in {"img", "iframe", "link", "object", "form", "a"}]
    assert not [name for _, attributes in elements for name in attributes if name.startswith("on") or name == "style"]
    policy = next(a["content"] for t, a in elements if t == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in str(policy)
    assert "unsafe" not in str(policy)
    assert "&lt;/script&gt;" in page


def test_the_json_behind_the_page_is_whole(page):
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert text
    tree = json.loads(text[1])
    assert tree["runs"][1]["run"] == HOSTILE
    assert tree["runs"][0]["evaluations"][2]["confusion"] == subject().tally.confusion.tolist()
    recall = {row["name"]: row["recall"] for row in tree["runs"][0]["evaluations"][2]["by_class"]}
    assert recall["food"][3] == subject().tally.confusion[:, 0].sum()


def test_a_cell_stands_beside_the_rest_of_its_class():
    s = subject()
    name, group, value = s.cells()[0]
    found = s.beside()[name, group]
    grouping = next(g for g in groupings(s.group_values) if group in g.groups)
    hits, n = recall(grouping.of(s.tally))
    g, k = grouping.groups.index(group), CLASSES.index(name)
    rest = (hits[:, k].sum() - hits[g, k]) / (n[:, k].sum() - n[g, k])
    assert found.gap.value == pytest.approx(value.value - rest)
    assert found.gap.low < found.gap.value < found.gap.high
    assert value.value < found.shrunk.value < rest
    assert 0 <= found.p <= 1


def test_the_worst_comes_first_and_small_cells_are_never_the_worst():
    s = subject()
    cells = s.cells()
    large = [cell for _, _, cell in cells if cell.n >= LEAST_N]
    assert [c.value for c in large] == sorted(c.value for c in large)
    assert cells[-1][2].n < LEAST_N
    worst = s.worst_cell()
    assert worst
    assert worst[2].n >= LEAST_N
    for table in (s.class_table(), *s.group_tables()):
        place = 0 if table.title == "By class" else 1
        values = [line.cells[place].value for line in table.lines]
        assert values == sorted(values)


def test_fit_is_the_difference_of_recalls_on_the_training_split_and_on_others_the_largest_gap_first():
    (fit,) = fits(subjects("r"), "train")
    assert fit.split == "test"
    own, other = (dict(s.recalls()) for s in (subject(5), subject(0)))
    gaps = [gap.value for _, _, _, gap in fit.lines]
    assert gaps == sorted(gaps, reverse=True)
    for name, a, b, gap in fit.lines:
        assert (a, b) == (own[name], other[name])
        assert gap.value == pytest.approx(a.value - b.value)
        assert gap.low < gap.value < gap.high
    assert fits(subjects("r"), "nothing") == []


def test_the_page_tells_underfitting_from_overfitting(page):
    assert "Underfitting and overfitting" in page
    assert "train and test, the largest gap first" in page


def test_the_cost_is_that_of_the_decisions_where_classes_occur_as_in_use():
    s = subject()
    confusion = s.tally.confusion.sum(0)
    rows = confusion / confusion.sum(1, keepdims=True)
    expected = sum(s.ledger.deployment_prior[y] * rows[y] @ s.ledger.costs[y] for y in range(3))
    assert s.cost() == pytest.approx(expected)


def test_a_class_that_is_not_in_the_split_leaves_no_number_in_use():
    s = subject()
    confusion = s.tally.confusion.copy()
    confusion[:, 2] = 0
    t = Tally(confusion, *s.tally.parts[1:])
    without = Subject(s.run, s.split, s.view, t, s.ledger, s.group_values)
    assert np.isnan(without.cost())
    assert np.isnan(without.nll())
    assert "nan" not in summary([without])


def test_the_gain_of_the_worst_class_has_an_interval_around_it():
    old, new = subject(0), subject(3)
    low, high = recall_gain(old, new)
    assert low < new.worst_class()[1].value - old.worst_class()[1].value < high
    low, high = recall_gain(old, old)
    assert low < 0 < high


def test_the_summary_has_a_column_for_each_subject_and_a_line_for_each_class():
    text = summary([subject(run="a"), subject(run="b")])
    assert [line.split("  ")[0] for line in text.splitlines()][:4] == ["run", "split", "decision", "recall of food"]
    assert "a" in text.splitlines()[0]
    assert text.count("\n") == 10


def test_figures_say_what_they_show_in_words_too():
    s = subject()
    drawn = str(confusion(s.tally, CLASSES, "Confusion of it")) + str(reliability(s.tally, "Reliability of it"))
    assert 'aria-label="Confusion of it"' in drawn
    assert "food called drink" in drawn
    assert HOSTILE not in drawn


def test_a_run_that_is_damaged_or_not_evaluated_is_refused(tmp_path: Path):
    with pytest.raises(Refusal, match="holds nothing"):
        read_run(tmp_path)
    with durable.publishing(tmp_path / "evaluation" / "test") as aside:
        (aside / "facts.json").write_text("{}")
    (tmp_path / "evaluation" / "test" / "facts.json").write_text("[]")
    with pytest.raises(Refusal, match=r"facts\.json is not as it was written"):
        read_run(tmp_path)


def test_an_audit_is_shown_with_its_population_its_skills_and_its_units(dataset: Path):
    index = open_index(dataset)
    column, values = next(iter(index.group_values.items()))
    population = Reference(
        (column,), [(v,) for v in (*values, HOSTILE)], np.full(len(values) + 1, 1 / (len(values) + 1))
    )
    tree = json.loads(json.dumps(to_json(audit(index, "train", 30, Asked(population, column))), allow_nan=False))
    shown = ShownAudit("data", tree, _properties(tree["properties"]), list(_skills(tree)))
    environment = Environment(loader=PackageLoader("trainer.report", ""), autoescape=True)
    text = str(environment.get_template("audit.html").module.of_data(shown))  # pyright: ignore[reportAttributeAccessIssue]
    assert not [tag for tag, _ in Elements(text).found if tag in {"script", "img", "style"}]
    for part in ("against a population", "images needed", "stand in several splits", "of the most"):
        assert part in text
    for finding in tree["findings"]:
        assert str(escape(finding["text"])) in text
    assert {of for of, _ in shown.skills} == {"label", *index.group_values}
