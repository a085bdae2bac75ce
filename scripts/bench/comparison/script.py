"""What every benchmark ends and talks with: its exit code, or one message and the error's code; and progress."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from llmbuild.errors import LlmbuildError


def say(text: str) -> None:
    """Tell what goes on."""
    print(text, file=sys.stderr, flush=True)


def end(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` and leave. SIGTERM leaves as well, through every `finally`: what was started is ended."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        sys.exit(main())
    except LlmbuildError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
