"""What is wrong with something that a user gave: all of it at once, each with its place and its repair."""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

SHOWN = 20


class Fault(NamedTuple):
    """One thing that is wrong."""

    where: str
    """file:line:column, a file, or the dotted path of a setting."""
    what: str
    fix: str = ""

    def __str__(self) -> str:
        """On one line, whatever a file is called."""
        text = f"{self.where}: {self.what}" + (f" — {self.fix}" if self.fix else "")
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class Refusal(Exception):
    """The input cannot be used as it is. Carries every fault found in one pass; jobs print it and exit with its code.

    Exit codes follow sysexits.h: 2 usage or settings, 65 data, 73 cannot write, 74 no room on the disk, 75 try again.
    `more` faults were found than are carried.
    """

    def __init__(self, title: str, faults: Sequence[Fault] = (), exit_code: int = 2, more: int = 0) -> None:
        self.title, self.faults, self.exit_code, self.more = title, list(faults), exit_code, more
        super().__init__(title, self.faults, exit_code, more)

    def save(self, path: Path) -> None:
        """Leaves the refusal for the process that started this one; the first one stays."""
        tree = {"title": self.title, "faults": self.faults, "exit_code": self.exit_code}
        with contextlib.suppress(FileExistsError), path.open("x") as file:
            json.dump(tree, file)

    @classmethod
    def load(cls, path: Path) -> "Refusal":
        tree = json.loads(path.read_text())
        return cls(tree["title"], [Fault(*fault) for fault in tree["faults"]], tree["exit_code"])

    def __str__(self) -> str:
        more = len(self.faults) - SHOWN + self.more
        lines = [self.title, *(f"  {fault}" for fault in self.faults[:SHOWN])]
        return "\n".join(lines + ([f"  … and {more:,} more"] if more > 0 else []))
