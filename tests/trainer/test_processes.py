"""A run seen from outside: who owns its folder, signals, and workers that are stuck, with real processes."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_loaders import durable
from data_loaders.faults import Refusal
from data_loaders.settings import dump, parse
from trainer.context import Cluster, Local, leave, spawn
from trainer.watch import FOLDER, WAITING, At, Sign, Watch, interruptible, is_asked_to_stop, stuck, watching

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


# ------------------------------------------------------------------ settings


@pytest.mark.parametrize(("words", "least", "most"), [("3", 3, 3), ("[1, 4]", 1, 4), ("[2, 2]", 2, 2)])
def test_workers_are_a_number_or_the_least_and_the_greatest(words: str, least: int, most: int):
    cluster = parse(Cluster, [f"workers={words}"])
    assert (cluster.least, cluster.most) == (least, most)
    assert Cluster.model_validate(cluster.model_dump(mode="json")) == cluster


@pytest.mark.parametrize("words", ["0", "x", "1.5", "[]", "[4, 1]", "[0, 2]", "[1, 2, 3]"])
def test_other_workers_are_refused_in_one_line(words: str):
    with pytest.raises(Refusal) as refusal:
        parse(Cluster, [f"workers={words}"])
    (fault,) = refusal.value.faults
    assert "the least and the greatest, as in [1, 4]" in fault.what


# ------------------------------------------------------------------ signals


def test_a_signal_is_kept_until_one_asks_for_it_and_means_again_what_it_meant_afterwards():
    former = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    then: list[bool] = []
    with interruptible(lambda: then.append(is_asked_to_stop())):
        assert not is_asked_to_stop()
        os.kill(os.getpid(), signal.SIGINT)
        assert is_asked_to_stop()
        assert then == [True]
    assert not is_asked_to_stop()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == former


def test_a_signal_that_was_ignored_stays_so():
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruptible():
            os.kill(os.getpid(), signal.SIGINT)
            assert not is_asked_to_stop()
    finally:
        signal.signal(signal.SIGINT, former)


def test_a_thread_that_is_not_the_main_one_leaves_signals_alone():
    found = []

    def enter() -> None:
        with interruptible():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGTERM)]


TWICE = """
import time
from trainer.watch import interruptible, is_asked_to_stop

with interruptible():
    print("begun", flush=True)
    while not is_asked_to_stop():
        time.sleep(0.01)
    print("asked", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_a_process_at_once(second: signal.Signals):
    process = subprocess.Popen([sys.executable, "-c", TWICE], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout
    assert process.stderr
    for line, sent in ((b"begun\n", signal.SIGTERM), (b"asked\n", second)):
        assert process.stdout.readline() == line
        process.send_signal(sent)
    assert process.wait() == -second
    assert b"once more, and it ends at once" in process.stderr.read()
    process.stdout.close()
    process.stderr.close()


# ------------------------------------------------------------------ who is stuck

signs = st.builds(
    Sign,
    host=st.just("h"),
    pid=st.integers(1, 3),
    beat=st.integers(0, 3),
    step=st.integers(0, 3),
    moves=st.integers(0, 3),
    doing=st.sampled_from(["loading data", "computing", WAITING]),
    long=st.booleans(),
    where=st.just(""),
)
looks = st.lists(st.tuples(st.none() | signs, st.none() | signs), min_size=1, max_size=5)


@given(looks)
def test_nobody_is_blamed_while_somebody_is_alive_and_moves_and_nobody_is_frozen(look):
    before, now = zip(*look, strict=True)
    blamed = stuck(before, now)
    frozen = {
        rank for rank, (b, a) in enumerate(look) if a is None or (b is not None and (b.pid, b.beat) == (a.pid, a.beat))
    }
    assert set(blamed) <= set(range(len(look)))
    if frozen:
        assert set(blamed) == frozen
        return
    if any(b is None or a.has_moved(b) or (a.long and a.doing != WAITING) for b, a in look):
        assert not blamed
        return
    assert blamed
    for rank in blamed:
        least = [a for _, a in look if a.doing != WAITING or look[rank][1].doing == WAITING]
        assert (look[rank][1].step, look[rank][1].moves) == min((a.step, a.moves) for a in least)


def workers(run: Path, count: int, ended: list[Refusal], beats: int = 10) -> list[tuple[At, Watch]]:
    """So many workers of this process, after their first step, which are stuck after so many beats."""
    places = [At(is_warm=True) for _ in range(count)]
    (run / FOLDER).mkdir()
    return [(at, Watch(run, rank, count, at, beats, ended.append)) for rank, at in enumerate(places)]


def move(at: At, step: int, doing: str, long: bool = False) -> None:
    Local(Path(), CPU, at=at).progress(step, doing, long)


def test_who_loads_for_ever_while_the_others_wait_is_named_with_what_it_does_and_where(tmp_path: Path):
    ended: list[Refusal] = []
    (first, one), (second, two) = workers(tmp_path, 2, ended)
    move(first, 7, "loading data")
    move(first, 7, "computing")
    move(second, 7, "loading data")
    for _ in range(10):
        one.beat()
        two.beat()
        assert not ended
    one.beat()
    (refusal,) = ended
    assert refusal.exit_code == 75
    (fault,) = refusal.faults
    assert fault.where == "worker 1"
    assert fault.what.startswith("is stuck, loading data at step 7")
    assert f"process {os.getpid()} on " in fault.what


def test_a_worker_that_shows_no_sign_of_life_is_named_though_another_is_behind(tmp_path: Path):
    ended: list[Refusal] = []
    (first, one), (second, two), (third, _) = workers(tmp_path, 3, ended)
    for at, step in ((first, 5), (second, 4), (third, 5)):
        move(at, step, "computing")
    for _ in range(11):
        one.beat()
        two.beat()
    assert [fault.where for fault in ended[0].faults] == ["worker 2"]


@pytest.mark.parametrize("kind", ["moves", "takes long"])
def test_who_waits_for_a_worker_that_moves_or_may_take_long_blames_nobody(tmp_path: Path, kind: str):
    ended: list[Refusal] = []
    (first, one), (second, two) = workers(tmp_path, 2, ended)
    move(first, 1, WAITING)
    move(second, 1, "computing", long=kind == "takes long")
    for beat in range(50):
        one.beat()
        two.beat()
        if kind == "moves" and beat % 4 == 0:
            move(second, 1, "computing")
    assert not ended


@pytest.mark.parametrize("steps", [0, 1])
def test_nobody_is_held_for_stuck_in_the_first_step_nor_between_two(tmp_path: Path, steps: int):
    ended: list[Refusal] = []
    ((at, watch),) = workers(tmp_path, 1, ended)
    at.is_warm = False
    context = Local(tmp_path, CPU, at=at)
    context.progress(0, "computing")
    for _ in range(steps):
        context.ask_to_stop()
    for _ in range(50):
        watch.beat()
    assert not ended
    context.ask_to_stop()
    context.progress(1, "loading data")
    for _ in range(50):
        watch.beat()
    assert ended


def test_a_run_that_was_stopped_as_a_whole_goes_on(tmp_path: Path):
    ended: list[Refusal] = []
    ((at, watch),) = workers(tmp_path, 1, ended)
    move(at, 1, "computing")
    for _ in range(10):
        watch.beat()
    time.sleep(0.1)  # whatever a clock says, only beats count
    move(at, 2, "computing")
    for _ in range(10):
        watch.beat()
    assert not ended


def test_a_full_or_lost_disk_does_not_end_the_watch(tmp_path: Path):
    ended: list[Refusal] = []
    ((_, watch),) = workers(tmp_path, 1, ended)
    (tmp_path / FOLDER).rmdir()
    (tmp_path / FOLDER).write_text("")
    watch.beat()
    assert not ended


# ------------------------------------------------------------------ several processes


def shown(run: Path, rank: int) -> Sign | None:
    """The newest sign of life of a worker."""
    path = run / FOLDER / f"{rank}.json"
    return Sign(*json.loads(path.read_text())) if path.exists() else None


class Noticed(Local):
    """Rank 0 hears at its 20th step that it may be time to look, and there is something to see."""

    looks: int = 0

    def is_time_to_look(self) -> bool:
        self.looks += 1
        return self.rank == 0 and self.looks == 20

    def is_noticed(self) -> bool:
        return True


def _ask(rank: int, folder: str) -> None:
    context, heard = Noticed(Path(folder), CPU, rank, 3), []
    for step in range(200):
        if (rank, step) == (1, 50):
            os.kill(os.getpid(), signal.SIGTERM)
        heard.append(context.ask_to_stop())
        context.sum(torch.zeros(1))  # as gradients do, between the vote and its answer
        if heard[-1] == "stop":
            break
    (Path(folder) / f"{rank}.json").write_text(json.dumps(heard))


def test_all_workers_hear_the_same_at_the_same_step_though_only_one_was_asked(tmp_path: Path):
    spawn(_ask, Cluster(on="local", workers=3, device="cpu"), str(tmp_path))
    heard = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert heard[0] == heard[1] == heard[2]
    assert heard[0] == ["go_on"] * 20 + ["checkpoint"] + ["go_on"] * 30 + ["stop"]


def test_a_worker_alone_hears_at_once_what_it_was_asked(tmp_path: Path):
    context = Local(tmp_path, CPU)
    with interruptible():
        assert context.ask_to_stop() == "go_on"
        os.kill(os.getpid(), signal.SIGTERM)
        assert context.ask_to_stop() == "stop"


def _freeze(rank: int, folder: str) -> None:
    context = Local(Path(folder), CPU, rank, 2)
    with watching(Watch(context.folder, rank, 2, context.at, 1.0, leave)):
        for step in range(100):
            context.progress(step, "computing")
            if (rank, step) == (1, 5):
                while (sign := shown(context.folder, 1)) is None or sign.step < step:
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGSTOP)
            context.sum(torch.zeros(1))


def test_a_frozen_worker_is_named_and_ended_though_it_hears_no_signal_but_one(tmp_path: Path):
    with pytest.raises(Refusal, match="worker 1: shows no sign of life, computing at step 5") as refusal:
        spawn(_freeze, Cluster(on="local", workers=2, device="cpu"), str(tmp_path))
    assert refusal.value.exit_code == 75
    frozen = shown(tmp_path, 1)
    assert frozen
    assert not Path(f"/proc/{frozen.pid}").exists()


def _fail(rank: int, how: str) -> None:
    if rank == 1 and how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1:
        raise ValueError("a mistake")


@pytest.mark.parametrize(
    ("how", "kind", "said"), [("killed", Refusal, "SIGKILL"), ("wrong", RuntimeError, "a mistake")]
)
def test_it_is_told_how_a_worker_ended(how: str, kind: type[Exception], said: str):
    with pytest.raises(kind, match=rf"worker 1(.|\n)*{said}"):
        spawn(_fail, Cluster(on="local", workers=2, device="cpu"), how)


# ------------------------------------------------------------------ a run


def test_nothing_to_resume_is_refused_and_leaves_no_folder(dataset: Path, tmp_path: Path):
    from small_runs import config_for

    from trainer.run import train

    config = config_for(dataset, tmp_path / "runs", resume=True)
    with pytest.raises(Refusal, match="nothing to resume") as refusal:
        train(config)
    assert refusal.value.exit_code == 2
    assert not (tmp_path / "runs").exists()


def test_a_run_is_one_process_alone_and_ends_with_a_checkpoint_when_any_worker_is_asked(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    from small_runs import config_for

    from trainer.run import claimed

    steps = {"train.steps": 100_000, "train.report_every": 100_000}
    config = config_for(dataset, tmp_path, **steps, **{"cluster.workers": 2})
    (tmp_path / "c.yaml").write_text(dump(config))
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.train", str(tmp_path / "c.yaml")], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    while (sign := shown(config.run_folder, 1)) is None or sign.step < 5:
        assert process.poll() is None
        time.sleep(0.05)

    with pytest.raises(Refusal, match=rf"belongs to process {process.pid} \(train\)") as refusal:
        claimed(config).__enter__()
    assert refusal.value.exit_code == 75

    os.kill(sign.pid, signal.SIGTERM)
    _, said = process.communicate()
    assert process.returncode == 75
    assert "the same command goes on" in said
    assert "Traceback" not in said
    (checkpoint,) = (config.run_folder / "checkpoints").iterdir()
    assert durable.damage(checkpoint) is None
    assert f"step {int(checkpoint.name.removeprefix('step-')):,} of 100,000" in said

    with claimed(config.model_copy(update={"resume": True})):
        assert f"resuming from {checkpoint}" in capsys.readouterr().err
