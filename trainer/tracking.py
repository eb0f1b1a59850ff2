"""Weights & Biases: one run for each training, held by the collector and closed by the driver. The only file that
imports wandb. Without a key it is offline and never touches the network; a failing backend never stops a training."""

import math
import netrc
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

from pydantic import NonNegativeInt, PositiveFloat

from data_loaders.progress import say
from data_loaders.settings import Settings

GRACE_S = 10.0
"""What W&B may need beyond its own time limit, to give up and to go on offline or to write the last records."""


class Tracking(Settings):
    """Weights & Biases."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """`auto` is WANDB_MODE if that is set, else online with a key (WANDB_API_KEY or netrc), else offline."""
    project: str = "evenkeel"
    entity: str | None = None
    """User or team; by default that of the key."""
    group: str | None = None
    """Runs of one group are shown together."""
    artifacts: bool = True
    """Whether data set and model are recorded as artifacts."""
    smallest_cell: NonNegativeInt = 0
    """Groups and cells of fewer images are not sent, for the sake of those on them, nor is what was said of each
    validation image."""
    timeout_s: PositiveFloat = 60.0
    """Longest wait for the backend, at the start and at the end."""


class Chart(NamedTuple):
    """One of W&B's own charts, and the columns of a table that it draws."""

    spec: str
    fields: Mapping[str, str]
    """What the chart calls a column -> the column."""
    texts: Mapping[str, str]


CONFUSION = Chart(
    "wandb/confusion_matrix/v1",
    {name: name for name in ("Actual", "Predicted", "nPredictions")},
    {"title": "Confusion matrix"},
)
"""What wandb.plot.confusion_matrix draws, which however wants a row for each image and counts them itself."""
RELIABILITY = Chart(
    "wandb/lineseries/v0",
    {"step": "confidence", "lineKey": "line", "lineVal": "accuracy"},
    {"title": "Reliability", "xname": "confidence"},
)


class Artifact(NamedTuple):
    """Files that W&B keeps under one name, in versions."""

    name: str
    kind: Literal["dataset", "model"]
    files: Sequence[Path]
    facts: Mapping[str, Any]


class Tracker:
    """A W&B run. Whatever goes wrong in it is said once, on standard error, and kept in `problem`.

    A thread of its own speaks to W&B, which waits for the backend in places that have no time limit: no call waits for
    it but the first and `close`.
    """

    def __init__(self, settings: Tracking, folder: Path, name: str, run_id: str, config: Mapping[str, Any]) -> None:
        self.problem: str | None = None
        self._settings, self._folder = settings, folder
        self._run: Any = None
        self._places: dict[str, str] = {}
        self._tasks: SimpleQueue[Callable[[], Any] | None] = SimpleQueue()
        mode = _mode(settings)
        self._open = mode != "disabled"
        if self._open:
            self._places = _keep_below(folder)
            threading.Thread(target=self._work, name="wandb", daemon=True).start()
            self._tasks.put(lambda: self._start(mode, name, run_id, config))
            self._wait()

    @property
    def place(self) -> str:
        """Where the run is to be seen: its address, or the folder to `wandb sync`."""
        if self._run is None:
            return ""
        return str(Path(self._run.dir).parent) if self._run.offline else self._run.url

    def log(self, values: Mapping[str, Any]) -> None:
        """Values of one step; `step` among them is the x axis."""
        row = dict(values)
        self._do(lambda run: run.log(row))

    def table(
        self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], chart: Chart | None = None
    ) -> None:
        """A table, by itself or as what a chart draws; it may have more columns than the chart."""

        def log(run: Any) -> None:
            import wandb

            table = wandb.Table(columns=list(columns), data=[[_or_none(value) for value in row] for row in rows])
            drawn = chart and wandb.plot_table(chart.spec, table, dict(chart.fields), dict(chart.texts))
            run.log({name: drawn or table})

        self._do(log)

    def images(self, name: str, pictures: Sequence[tuple[str, Path]]) -> None:
        """Pictures under one name, each with its caption; W&B takes the first 108."""

        def log(run: Any) -> None:
            import wandb

            run.log({name: [wandb.Image(str(path), caption=caption) for caption, path in pictures]})

        if pictures:
            self._do(log)

    def uses(self, artifact: Artifact) -> None:
        """Records what the run is made from. The files are copied, since others may change them before a sync."""
        if self._settings.artifacts:
            # What run.use_artifact does with a new artifact, but for its refusal to be offline and its endless wait.
            how = {"is_user_created": True, "use_after_commit": True}
            self._do(lambda run: run._log_artifact(_artifact(artifact, "mutable"), **how))

    def makes(self, artifact: Artifact, aliases: Sequence[str]) -> None:
        """Records what the run has made. The files are not copied, so they must stay as they are until a sync."""
        if self._settings.artifacts:
            self._do(lambda run: run.log_artifact(_artifact(artifact, "immutable"), aliases=list(aliases)))

    def close(self, summary: Mapping[str, Any], exit_code: int = 0) -> None:
        """Writes the summary and ends the run, and with it W&B in this process."""

        def end(run: Any) -> None:
            import wandb

            run.summary.update(dict(summary))
            run.finish(exit_code=exit_code)
            wandb.teardown()  # which waits until the last record is on the disk; finish does not

        if self._open:
            self._do(end)
            self._wait()
            self._open = False
            self._tasks.put(None)
            for name in self._places:
                os.environ.pop(name, None)

    def _start(self, mode: Any, name: str, run_id: str, config: Mapping[str, Any]) -> None:
        import wandb
        from wandb.errors import CommError

        settings = self._settings
        self._folder.mkdir(parents=True, exist_ok=True)
        options: dict[str, Any] = {
            "project": settings.project,
            "entity": settings.entity,
            "group": settings.group,
            "name": name,
            "id": run_id,
            "config": dict(config),
            "dir": str(self._folder),
            "resume": "allow",  # offline too: then `wandb sync` adds a second file to the run, and does not start anew
            "settings": wandb.Settings(
                console="off",
                silent=True,
                init_timeout=settings.timeout_s,
                finish_timeout=settings.timeout_s,
                finish_timeout_raises=False,
                save_code=False,
                disable_git=True,
            ),
        }
        try:
            self._run = wandb.init(mode=mode, **options)
        except CommError as wrong:
            self._say(f"W&B cannot be reached, so this run is offline: {wrong}")
            wandb.teardown()  # which frees the id of the run that did not start
            self._run = wandb.init(mode="offline", **options)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def _do(self, action: Callable[[Any], Any]) -> None:
        """Has the thread do something with the run, if there is one, after all that it was given before."""
        if self._open:
            self._tasks.put(lambda: self._run and action(self._run))

    def _work(self) -> None:
        for task in iter(self._tasks.get, None):
            try:
                task()
            except Exception as wrong:  # tracking is never a reason to lose a training
                self._say(f"W&B: {type(wrong).__name__}: {wrong}")

    def _wait(self) -> None:
        """Until the thread has done all that it was given, or has had its time."""
        done = threading.Event()
        self._tasks.put(done.set)
        longest_s = self._settings.timeout_s + GRACE_S
        if not done.wait(longest_s):
            fix = f"`wandb sync --include-online` in {self._folder} uploads what is missing"
            self._say(f"W&B gave no answer within {longest_s:.0f} s; {fix}")

    def _say(self, problem: str) -> None:
        if self.problem is None:
            say(problem)
        self.problem = problem


def safe_name(name: str) -> str:
    """The name as W&B takes it for an artifact: at most 128 of letters, digits, dot, dash and underscore."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:128]


def _artifact(artifact: Artifact, policy: Literal["mutable", "immutable"]) -> Any:
    import wandb

    made = wandb.Artifact(safe_name(artifact.name), artifact.kind, metadata=dict(artifact.facts))
    for path in artifact.files:
        made.add_file(str(path), policy=policy, skip_cache=True)
    return made


def _keep_below(folder: Path) -> dict[str, str]:
    """Has W&B keep its copies and logs below this folder and not in the home folder, out of which another machine could
    not sync; returns what it sets. Where the environment says a place already, that one stays."""
    places = {"WANDB_DATA_DIR": folder / "wandb" / "data", "WANDB_CACHE_DIR": folder / "wandb" / "cache"}
    ours = {name: str(path) for name, path in places.items() if name not in os.environ}
    os.environ.update(ours)
    return ours


def _or_none(value: Any) -> Any:
    """What JSON can say: a missing number is null."""
    return None if isinstance(value, float) and math.isnan(value) else value


def _mode(settings: Tracking) -> Any:
    if settings.mode != "auto":
        return settings.mode
    return os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    import wandb

    addresses = [os.environ.get("WANDB_BASE_URL") or wandb.Settings().base_url, "https://api.wandb.ai"]
    try:
        known = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    return any(known.authenticators(urlsplit(address).hostname or "") for address in addresses)
