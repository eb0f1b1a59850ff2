"""How far a long work has come, and how long it still takes, on standard error."""

import sys
import time
from typing import TextIO

LINE_EVERY_S = 5.0


def say(*lines: str) -> None:
    """Lines for the person at the terminal, on standard error."""
    for line in lines:
        print(line, file=sys.stderr, flush=True)


class Progress:
    """A line that is rewritten on a terminal, and printed every few seconds elsewhere."""

    def __init__(self, what: str, total: int | None, unit: str, stream: TextIO | None = None) -> None:
        self.what, self.total, self.unit, self.stream = what, total, unit, stream or sys.stderr
        self.began = self.shown = time.monotonic()

    def show(self, done: int, more: str = "") -> None:
        """`done` of the total, where that is known, are done; `more` says what else is worth knowing."""
        now, is_last = time.monotonic(), self.total is not None and done >= self.total
        live = self.stream.isatty()
        if not is_last and now - self.shown < (0.2 if live else LINE_EVERY_S):
            return
        self.shown = now
        rate = done / max(now - self.began, 1e-9)
        left = "" if is_last or self.total is None else f", {(self.total - done) / max(rate, 1e-9):,.0f} s left"
        of = "" if self.total is None else f" of {self.total:,}"
        text = f"{self.what}: {done:,}{of} {self.unit}, {rate:,.0f}/s{left}{more and ', ' + more}"
        end = "\n" if is_last or not live else ""
        print(f"\r\x1b[K{text}" if live else text, end=end, file=self.stream, flush=True)
