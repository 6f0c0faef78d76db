"""Whose turn it is: a session serves one request at a time, and the threads that want it wait for each other."""

from __future__ import annotations

import threading
import weakref
from contextlib import AbstractContextManager

from qeff_ir.errors import RuntimeInputError


class Turns:
    """Turns of one session.

    What is entered is the lock of `threading` itself: an interrupt (Ctrl-C) finds it either taken, and then the block
    gives it back, or not taken.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._last: weakref.ref[object] | None = None

    def note(self, user: object) -> None:
        """Say who uses the session now; `None` for somebody else. Who has the turn calls it.

        The user is referred to weakly, for it holds the session and these turns: in a cycle, a session would keep its
        memory until the next garbage collection.
        """
        self._last = None if user is None else weakref.ref(user)

    def was(self, user: object) -> bool:
        """Whether it has used the session last, so that what it keeps there is its own still."""
        return self._last is not None and self._last() is user

    @property
    def mine(self) -> bool:
        """Whether this thread has the turn."""
        return self._lock._is_owned()  # pyright: ignore[reportAttributeAccessIssue]  # as `threading.Condition` asks it

    def take(self) -> AbstractContextManager[object]:
        """A turn, for a `with` statement; it waits for the turn of another thread.

        Raises:
            RuntimeInputError: This thread has the turn already, and would wait for itself.
        """
        if self.mine:
            raise RuntimeInputError(
                "a request to this model is running in this thread (a streamer, a logits processor or a stopping "
                "criterion calls the model that calls it): wait until it has returned, or use another model object"
            )
        return self._lock

    def join(self) -> AbstractContextManager[object]:
        """As `take`, but a thread that has the turn keeps it."""
        return self._lock
