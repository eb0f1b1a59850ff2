"""Jobs submitted to a Ray head on this machine, by the commands that the README gives."""

import os
import secrets
import signal
import socket
import subprocess
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet
import pytest

ROOT = Path(__file__).parent.parent
Submit = Callable[[str], subprocess.CompletedProcess[str]]
DEMO = "source.kind=demo source.images=600 source.size=24 source.imbalance=[6,3,2]"
SMALL = "data.size=24 data.batch=32 model.widths=[8,16] cluster.device=cpu train.steps=12 train.report_every=4"


def test_the_copy_that_a_job_runs_in_holds_the_code_and_neither_data_nor_runs_nor_the_environment(tmp_path):
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    root = tmp_path / "project"
    out = ("runs/r/model", "datasets/d.arrow", "build/x", ".venv/bin/python", "wandb/w")
    for name in (".gitignore", "jobs/train.py", *out):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes((ROOT / name).read_bytes() if name == ".gitignore" else b"x")
    (root / ".git").mkdir()
    (root / ".git" / "config").write_text("x")
    package = tmp_path / "package.zip"
    create_package(str(root), package, include_gitignore=True, excludes=get_runtime_env_default_excludes())
    names = {name for name in zipfile.ZipFile(package).namelist() if not name.endswith("/")}
    assert names == {".gitignore", "jobs/train.py"}


@pytest.fixture(scope="module")
def submit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Submit]:
    """`make submit` to a head that `make head` started, on ports of its own and with a token of its own."""
    folder = tmp_path_factory.mktemp("head")
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    words = [f"PORT={ports[0]}", f"DASHBOARD={ports[1]}"]
    (folder / "token").write_text(secrets.token_hex(32))
    (folder / "token").chmod(0o600)
    environment = os.environ | {"RAY_AUTH_TOKEN_PATH": str(folder / "token"), "WANDB_MODE": "offline"}
    with (folder / "log").open("w") as log:
        head = subprocess.Popen(
            ["make", "head", *words], cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
        )

    def call(job: str) -> subprocess.CompletedProcess[str]:
        line = ["make", "submit", f"JOB={job}", *words]
        return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    try:
        for _ in range(60):
            assert head.poll() is None, (folder / "log").read_text()
            if not call("jobs.train --help").returncode:
                break
            time.sleep(1)
        yield call
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        head.wait(60)


@pytest.mark.slow
@pytest.mark.ray
def test_ingest_train_tune_and_report_run_as_submitted_jobs(submit, tmp_path):
    def done(job: str) -> str:
        ended = submit(job)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    data, runs = tmp_path / "data", tmp_path / "runs"
    done(f"jobs.ingest {DEMO} source.folder={tmp_path / 'images'} out={data} workers=2")
    log = done(f"jobs.train data.path={data} folder={runs} name=two cluster.workers=2 {SMALL}")
    lines = [line for line in log.splitlines() if line.startswith(("run ", "data ", "settings ", "workers "))]
    assert lines[0] == f"run two in {runs / 'two'}"
    assert [line.split()[0] for line in lines] == ["run", "data", "settings", "workers"]
    assert "workers 2 of Ray at 127.0.1.1" in lines[3]
    space = "'search.space.penalties.l2=log_uniform(1e-6, 1e-2)' 'search.space.model.dropout=uniform(0, 0.5)'"
    trials = f"search.trials=2 search.early_stopping=none {space}"
    done(f"jobs.tune data.path={data} folder={runs} name=tuned {SMALL} {trials}")
    table = pyarrow.parquet.read_table(runs / "tuned" / "trials.parquet").to_pydict()
    assert table["state"] == ["finished", "finished"]
    (winner,) = (runs / "tuned").glob("winner-*")
    done(f"jobs.evaluate run={runs / 'two'} device=cpu")
    done(f"jobs.report runs=[{runs / 'two'},{winner}] out={tmp_path / 'page.html'}")
    assert "two" in (tmp_path / "page.html").read_text()


@pytest.mark.slow
@pytest.mark.ray
def test_a_submitted_job_refuses_results_that_would_be_lost_and_says_so(submit, tmp_path):
    ended = submit(f"jobs.ingest {DEMO} source.folder={tmp_path / 'images'} out=datasets/lost")
    assert ended.returncode != 0
    assert "is in the job's temporary copy" in ended.stdout
