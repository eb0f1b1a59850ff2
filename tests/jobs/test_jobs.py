"""Jobs as people call them: help, errors, exit codes, and the whole way on a few images."""

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.csv
import pyarrow.parquet
import pytest
from PIL import Image

from data_loaders.faults import Refusal
from data_loaders.ingest import Ingest
from data_loaders.settings import Settings, describe, dump, parse, parse_text
from trainer.config import Config
from trainer.space import Tuning

ROOT = Path(__file__).parent.parent.parent
JOBS = sorted(p.stem for p in (ROOT / "jobs").glob("*.py") if p.stem not in {"__init__", "command"})
CONFIGS = sorted((ROOT / "jobs" / "configs").rglob("*.yaml"))


def call(job: str, *words: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", f"jobs.{job}", *words]
    return subprocess.run(line, check=False, capture_output=True, text=True, cwd=ROOT)


def run(monkeypatch: pytest.MonkeyPatch, job: str, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", [job, *map(str, words)])
    importlib.import_module(f"jobs.{job}").main()


@pytest.mark.parametrize("job", JOBS)
def test_help_says_what_a_job_does_with_an_example_and_waits_for_neither_torch_nor_ray(job):
    program = (
        f"import sys, runpy; sys.argv = ['{job}', '--help']\n"
        f"try: runpy.run_module('jobs.{job}', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "assert not {'torch', 'ray', 'wandb'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert f"python -m jobs.{job} " in done.stdout
    assert "Exit codes: 0 done" in done.stdout
    assert done.stdout.startswith(str(importlib.import_module(f"jobs.{job}").__doc__).strip()[:30])


@pytest.mark.parametrize("kind", [Config, Ingest, Tuning])
def test_help_lists_every_setting_with_its_type_and_default(kind: type[Settings]):
    lines = list(describe(kind))
    named = [line.split()[0] for line in lines if line.startswith("  ") and "(" in line and not line.startswith("   ")]
    for path in ("out",) if kind is Ingest else ("seed", "train.epochs", "optimizer.momentum", "data.sampler.temper"):
        assert path in named
    temper = [line for line in lines if "data.sampler.temper =" in line]
    each = [f"  data.sampler.temper = {default}  (float, >= 0.0, <= 1.0)" for default in ("0.0", "1.0")]
    assert temper in ([], each)  # of the two samplers that have one


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_config_loads_says_its_purpose_and_command_and_reloads_to_itself(path: Path):
    text = path.read_text()
    kind = Ingest if "source:" in text else Tuning if "search:" in text else Config
    config = parse(kind, [str(path)])
    assert parse_text(kind, dump(config)) == config
    lines = path.read_text().splitlines()
    comments = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    assert len(comments) >= 3
    assert any(f"{path.name}" in line and "python -m jobs." in line for line in comments)


@pytest.mark.parametrize(
    ("job", "words", "code", "said"),
    [
        (
            "train",
            ["data.path=x", "trian.epochs=3", "seed=-1"],
            2,
            ["did you mean train", "greater than or equal to 0"],
        ),
        ("train", ["nonsense"], 2, ["neither a YAML file nor path=value"]),
        ("train", [], 2, []),
        ("train", ["data.path=/nonexistent"], 65, ["python -m jobs.ingest"]),
        ("ingest", ["source.kind=csv", "source.path=/nonexistent.csv", "out=x"], 65, ["/nonexistent.csv"]),
        ("evaluate", ["run=/nonexistent"], 65, ["train it first"]),
        ("report", ["runs=[/nonexistent]"], 65, ["jobs.evaluate"]),
        ("predict", ["run=/nonexistent", "source.kind=folder", "source.path=/"], 65, ["train it first"]),
    ],
)
def test_what_is_wrong_is_said_in_a_few_lines_with_the_repair_and_the_exit_code(job, words, code, said):
    done = call(job, *words)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) < 10
    for text in said:
        assert text in done.stderr


def test_the_whole_way_on_a_few_drawn_images(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    drawn = ["source.kind=demo", "source.images=240", "source.size=24", "source.imbalance=[6,3,2]"]
    run(monkeypatch, "ingest", *drawn, "source.folder=images", "out=data", "workers=1")
    manifest = json.loads((tmp_path / "data" / "dataset.json").read_text())
    assert manifest["classes"] == ["desserts", "drinks", "food"]

    words = ["data.path=data", "data.size=24", "data.batch=32", "model.widths=[8,16]", "cluster.on=local"]
    run(monkeypatch, "train", *words, "cluster.device=cpu", "train.steps=8", "train.report_every=4", "name=small")
    run(monkeypatch, "evaluate", "run=runs/small", "device=cpu", "splits=[train,val,test,test_balanced]")
    run(monkeypatch, "diagnose", "run=runs/small")
    assert "not looked for: leakage; python -m jobs.audit data=" in capsys.readouterr().out
    run(monkeypatch, "audit", "data=data", "run=runs/small", "rows=60", "device=cpu")
    run(monkeypatch, "diagnose", "run=runs/small")
    said = capsys.readouterr().out
    assert "CLASS IMBALANCE: some classes have far more images than others" in said
    assert "not looked for" not in said
    run(monkeypatch, "compare", "runs=[runs/small]", "splits=[test_balanced]")
    assert "small, ledger against small, argmax, on test_balanced" in capsys.readouterr().out
    compared = json.loads((tmp_path / "comparison.json").read_text())
    assert [remedy["changed"] for remedy in compared] == [["decision: argmax -> ledger"]]
    run(monkeypatch, "report", "runs=[runs/small]", "out=page.html")
    page = (tmp_path / "page.html").read_text()
    assert "What each remedy did" in page
    assert "Diagnosis" in page
    remedies = json.loads((tmp_path / "page.json").read_text())["remedies"]
    assert {remedy["split"] for remedy in remedies} == {"test", "test_balanced", "val"}
    table = pyarrow.parquet.read_table(tmp_path / "runs" / "small" / "evaluation" / "metrics.parquet")
    assert set(table["split"].to_pylist()) == {"train", "val", "test", "test_balanced"}

    (tmp_path / "new").mkdir()
    for i in range(3):
        Image.fromarray(np.full((30, 50, 3), 80 * i, np.uint8)).save(tmp_path / "new" / f"{i}.png")
    (tmp_path / "new" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    source = ["run=runs/small", "source.kind=folder", "source.path=new", "device=cpu"]
    run(monkeypatch, "predict", *source)
    found = pyarrow.parquet.read_table("predictions.parquet").to_pydict()
    assert found["path"] == ["0.png", "1.png", "2.png"]
    p = np.stack([found[f"p.{name}"] for name in manifest["classes"]], 1)
    np.testing.assert_allclose(p.sum(1), 1)
    assert "broken.jpg" in (tmp_path / "predictions.rejected.csv").read_text()

    run(monkeypatch, "predict", *source, "out=other.csv", "decision.prior=uniform", "decision.costs.kind=equal")
    lines = (tmp_path / "other.csv").read_text().splitlines()
    assert len(lines) == 4
    (tmp_path / "new.csv").write_text("path,x\nnew/1.png,7\n")
    run(
        monkeypatch,
        "predict",
        "run=runs/small",
        "source.kind=csv",
        "source.path=new.csv",
        "device=cpu",
        "out=c.csv",
    )
    again = pyarrow.csv.read_csv("c.csv").to_pydict()
    assert again["p.food"][0] == pytest.approx(found["p.food"][1], abs=1e-5)


def test_an_evaluation_on_other_data_stays_apart_whatever_its_groups(own_data, monkeypatch, capsys):
    drawn = ["source.kind=demo", "source.images=90", "source.size=16", "source.folder=drawn", "workers=1"]
    run(monkeypatch, "ingest", *drawn, "out=first")
    words = ["data.path=first", "data.size=16", "data.batch=32", "model.widths=[8]", "cluster.on=local", "name=g"]
    run(monkeypatch, "train", *words, "cluster.device=cpu", "train.steps=4", "calibration.kind=group_temperature")
    run(monkeypatch, "evaluate", "run=runs/g", "device=cpu", "splits=[test]")
    plain = ["source.kind=csv", "source.path=drawn/labels.csv", "source.split_column=split", "workers=1"]
    run(monkeypatch, "ingest", *plain, "source.group_columns=[camera]", "out=second")
    run(monkeypatch, "evaluate", "run=runs/g", "device=cpu", "splits=[train,test]", "data=second")
    kept = sorted(path.name for path in (own_data / "runs/g/evaluation").iterdir() if path.is_dir())
    other = json.loads((own_data / "second/dataset.json").read_text())["fingerprint"]
    assert kept == ["test", f"test@{other}", f"train@{other}"]
    run(monkeypatch, "diagnose", "run=runs/g")
    assert "not looked for: underfitting" in capsys.readouterr().out  # those rows are not the ones it learnt from
    run(monkeypatch, "evaluate", "run=runs/g", "device=cpu", "splits=[train]")
    run(monkeypatch, "diagnose", "run=runs/g")  # though the other data have other groups than those rows
    assert "not looked for: underfitting" not in capsys.readouterr().out
    run(monkeypatch, "report", "runs=[runs/g]", "out=page.html")


def test_a_saved_config_makes_the_same_weights_again(dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [f"data.path={dataset}", "data.size=12", "data.batch=16", "model.widths=[8]", "cluster.on=local"]
    run(monkeypatch, "train", *words, "cluster.device=cpu", "train.steps=4", "name=first")
    run(monkeypatch, "train", "runs/first/config.yaml", "name=second")
    first, second = ((tmp_path / "runs" / n / "model" / "model.safetensors").read_bytes() for n in ("first", "second"))
    assert first == second


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore")
def test_ingest_on_ray_makes_the_same_data_set_as_in_processes(tmp_path, monkeypatch):
    import ray

    drawn = ["source.kind=demo", "source.images=60", "source.size=16", f"source.folder={tmp_path / 'images'}"]
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
    try:
        run(monkeypatch, "ingest", *drawn, f"out={tmp_path / 'ray'}", "shards.rows=8", "address=auto")
    finally:
        ray.shutdown()
    run(monkeypatch, "ingest", *drawn, f"out={tmp_path / 'here'}", "shards.rows=8", "workers=2")
    manifests = [json.loads((tmp_path / name / "dataset.json").read_text()) for name in ("ray", "here")]
    assert manifests[0]["fingerprint"] == manifests[1]["fingerprint"]
    assert len(manifests[0]["shards"]) > 4


def test_a_demonstration_removes_its_own_leavings_and_nothing_else(tmp_path):
    from jobs.demo import _clear

    (tmp_path / "data").mkdir()
    (tmp_path / "report.html").write_text("old")
    _clear(tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(Refusal, match="is not of a demonstration"):
        _clear(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "mine"


SMALL = ["data.size=12", "data.batch=16", "model.widths=[8]", "cluster.on=local", "cluster.device=cpu", "train.steps=4"]


@pytest.fixture
def own_data(dataset, tmp_path, monkeypatch) -> Path:
    """A copy of the data set at ./data, and a run of it at ./runs/r."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(dataset, tmp_path / "data")
    run(monkeypatch, "train", "data.path=data", *SMALL, "name=r")
    return tmp_path


def renamed(folder: Path) -> None:
    """The data set again, with its classes in another order of names."""
    lines = (folder / "labels.csv").read_text().replace(",food,", ",aaa,")
    (folder / "labels.csv").write_text(lines)


def test_a_run_does_not_go_on_with_other_data_at_the_same_path(own_data, dataset, monkeypatch):
    weights = (own_data / "runs/r/model/model.safetensors").read_bytes()
    shutil.rmtree(own_data / "data")
    source = [f"source.path={dataset.parent / 'labels.csv'}", "source.split_column=split", "workers=1"]
    run(monkeypatch, "ingest", "source.kind=csv", *source, "out=data")  # without its group columns
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, "train", "data.path=data", *SMALL, "name=r")
    assert end.value.code == 65
    assert (own_data / "runs/r/model/model.safetensors").read_bytes() == weights


def test_data_with_other_classes_than_the_model_is_not_evaluated(own_data, dataset, monkeypatch, capsys):
    shutil.copytree(dataset.parent, own_data / "images")
    shutil.rmtree(own_data / "images" / "data")
    renamed(own_data / "images")
    words = ["source.kind=csv", "source.path=images/labels.csv", "source.split_column=split", "workers=1"]
    run(monkeypatch, "ingest", *words, "out=other")
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, "evaluate", "run=runs/r", "data=other", "device=cpu")
    assert end.value.code == 65
    assert "the model knows dessert, drink, food" in capsys.readouterr().err


def test_an_evaluation_of_other_weights_is_not_reported(own_data, monkeypatch, capsys):
    run(monkeypatch, "evaluate", "run=runs/r", "device=cpu", "splits=test")
    shutil.rmtree(own_data / "runs/r/model")
    shutil.rmtree(own_data / "runs/r/checkpoints")
    (own_data / "runs/r/config.yaml").unlink()
    run(monkeypatch, "train", "data.path=data", *SMALL, "name=r", "seed=5")
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, "report", "runs=runs/r")
    assert end.value.code == 65
    assert "is of other weights" in capsys.readouterr().err


def test_what_predict_is_not_told_stays_as_the_model_was_trained(dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    use = ["decision.prior=uniform", "decision.costs.kind=matrix", "decision.costs.rows.food.drink=50"]
    run(monkeypatch, "train", f"data.path={dataset}", *SMALL, *use, "name=r")
    (tmp_path / "new").mkdir()
    Image.fromarray(np.full((12, 12, 3), 90, np.uint8)).save(tmp_path / "new" / "0.png")
    words = ["run=runs/r", "source.kind=folder", "source.path=new", "device=cpu", "out=p.csv"]
    found = []
    for more in ([], ["decision.prior=uniform"], ["decision.costs.kind=equal"], ["decision.prior=natural"]):
        run(monkeypatch, "predict", *words, *more)
        found.append(pyarrow.csv.read_csv("p.csv").to_pydict())
    plain, same_prior, other_costs, other_prior = found
    assert same_prior == plain
    assert other_costs["p.food"] == plain["p.food"]
    assert other_prior["p.food"] != plain["p.food"]


@pytest.mark.parametrize(
    ("job", "words", "code", "said"),
    [
        ("train", ["data.path=data", *SMALL, "name=x", "folder=afile"], 73, "afile"),
        ("train", ["data.path=data", *SMALL, "name=x", "cluster.device=gpu", "cluster.workers=99"], 2, "99 GPUs"),
        ("train", ["data.path=data", *SMALL, "name=x", "data.size=1"], 2, "too small for the model"),
        ("train", ["data.path=data", *SMALL, "name=x", "data.validation=vla"], 2, "calibration needs validation rows"),
        ("train", ["data.path=data", *SMALL, "name=x", "optimizer.lr=1e30", "cluster.workers=2"], 65, "diverged"),
        ("evaluate", ["run=runs/r", "splits=[test,tset]", "device=cpu"], 65, "no split 'tset'"),
        ("report", ["runs=[runs/r]", "out=report.json"], 2, ".html"),
        ("compare", ["runs=[runs/r]", "splits=[test]"], 65, "jobs.evaluate run=runs/r"),
        ("diagnose", ["run=runs/r"], 65, "jobs.evaluate run=runs/r"),
        ("diagnose", ["run=runs/none"], 65, "runs/none"),
        ("predict", ["run=runs/r", "source.kind=folder", "source.path=empty", "device=cpu"], 65, "holds no image"),
        ("predict", ["run=runs/r", "source.kind=folder", "source.path=empty", "out=p.txt"], 2, ".parquet or a .csv"),
    ],
)
def test_a_mistake_of_use_is_answered_in_a_line_with_its_code(own_data, monkeypatch, capsys, job, words, code, said):
    (own_data / "afile").write_text("")
    (own_data / "empty").mkdir()
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, job, *words)
    assert end.value.code == code
    assert said in capsys.readouterr().err
    assert not (own_data / "runs/r/evaluation/test").exists()


def test_a_damaged_shard_ends_an_evaluation_in_a_line(own_data, monkeypatch, capsys):
    for shard in (own_data / "data" / "shards").iterdir():
        shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, "evaluate", "run=runs/r", "device=cpu")
    assert end.value.code == 65
    assert "is not as it was written — ingest again" in capsys.readouterr().err
