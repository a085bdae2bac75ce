"""The exit of a benchmark: its exit code, or one message and the error's code."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn

from llmbuild.errors import LlmbuildError


def end(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` and leave."""
    try:
        sys.exit(main())
    except LlmbuildError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
