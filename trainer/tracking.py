"""Weights & Biases: one run for each training, held by the collector and closed by the driver. The only file that
imports wandb. Without a key it is offline and never touches the network; a failing backend never stops a training."""

import netrc
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import PositiveFloat

from data_loaders.progress import say
from data_loaders.settings import Settings


class Tracking(Settings):
    """Weights & Biases."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """`auto` is WANDB_MODE if that is set, else online with a key (WANDB_API_KEY or netrc), else offline."""
    project: str = "evenkeel"
    entity: str | None = None
    """User or team; by default that of the key."""
    group: str | None = None
    """Runs of one group are shown together."""
    timeout_s: PositiveFloat = 60.0
    """Longest wait for the backend, at the start and at the end."""


class Tracker:
    """A W&B run. Whatever goes wrong in it is said once, on standard error, and kept in `problem`."""

    def __init__(self, settings: Tracking, folder: Path, name: str, run_id: str, config: Mapping[str, Any]) -> None:
        self.problem: str | None = None
        self._run: Any = None
        mode = _mode(settings)
        if mode != "disabled":
            self._guard(lambda: self._start(settings, mode, folder, name, run_id, config))

    @property
    def place(self) -> str:
        """Where the run is to be seen: its address, or the folder to `wandb sync`."""
        if self._run is None:
            return ""
        return str(Path(self._run.dir).parent) if self._run.offline else self._run.url

    def log(self, values: Mapping[str, Any]) -> None:
        """Values of one step; `step` among them is the x axis."""
        self._guard(lambda: self._run and self._run.log(dict(values)))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        def log() -> None:
            import wandb

            self._run.log({name: wandb.Table(columns=list(columns), data=[list(row) for row in rows])})

        if self._run is not None:
            self._guard(log)

    def close(self, summary: Mapping[str, Any], exit_code: int = 0) -> None:
        """Writes the summary and ends the run, and with it W&B in this process."""

        def end() -> None:
            import wandb

            self._run.summary.update(dict(summary))
            self._run.finish(exit_code=exit_code)
            wandb.teardown()  # which waits until the last record is on the disk; finish does not

        if self._run is not None:
            self._guard(end)

    def _start(
        self, settings: Tracking, mode: Any, folder: Path, name: str, run_id: str, config: Mapping[str, Any]
    ) -> None:
        import wandb
        from wandb.errors import CommError

        options: dict[str, Any] = {
            "project": settings.project,
            "entity": settings.entity,
            "group": settings.group,
            "name": name,
            "id": run_id,
            "config": dict(config),
            "dir": str(folder),
            "resume": "allow" if mode == "online" else None,
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
            self._run = wandb.init(mode="offline", **(options | {"resume": None}))
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def _guard(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as wrong:  # tracking is never a reason to lose a training
            self._say(f"W&B: {type(wrong).__name__}: {wrong}")

    def _say(self, problem: str) -> None:
        if self.problem is None:
            say(problem)
        self.problem = problem


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
