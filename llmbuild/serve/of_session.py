"""What every step of an opened artifact has of its session."""

from __future__ import annotations

from contextlib import ExitStack

from llmbuild.runtime.session import Session


class OfSession:
    """Sizes of the artifact, and what is held of the session until it is closed."""

    def __init__(self, session: Session) -> None:
        """Take the session; nothing is held yet."""
        self._session, self._held = session, ExitStack()

    @property
    def context(self) -> int:
        """Positions of a slot."""
        return self._session.abi.context

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        return self._session.abi.vocabulary

    @property
    def ends(self) -> tuple[int, ...]:
        """The model's end tokens."""
        return self._session.abi.eos_tokens

    def close(self) -> None:
        """Give back to the session what is held of it."""
        self._held.close()
