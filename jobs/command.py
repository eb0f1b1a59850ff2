"""How every job is called: YAML files and path=value words, --help, one message for all faults, an exit code."""

import sys
from collections.abc import Callable
from typing import TypeVar

from data_loaders.faults import Refusal
from data_loaders.settings import Settings, describe, parse

S = TypeVar("S", bound=Settings)

EPILOGUE = """
Words: names of YAML files and path=value, later ones winning, for example
  {example}

Exit codes: 0 done; 2 wrong settings; 65 unusable data; 73 a file cannot be written or read; 74 a full disk while
training; 75 try again: the same command goes on; 130 interrupted at once."""


def command(kind: Callable[[], type[S]], doc: str | None, example: str, action: Callable[[S], None]) -> None:
    """Runs a job, and exits unless it went well. `kind` is a function, so that its imports can wait."""
    words = sys.argv[1:]
    try:
        settings_class = kind()
        if "--help" in words or "-h" in words or not words:
            print(f"{(doc or '').strip()}\n\nSettings:")
            print("\n".join(describe(settings_class)))
            print(EPILOGUE.format(example=example))
            sys.exit(0 if words else 2)
        action(parse(settings_class, words))
    except Refusal as refusal:
        print(refusal, file=sys.stderr)
        sys.exit(refusal.exit_code)
    except OSError as wrong:
        print(f"{wrong.filename or 'a file'}: {(wrong.strerror or str(wrong)).lower()}", file=sys.stderr)
        sys.exit(73)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
