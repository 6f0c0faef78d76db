"""What a trace changes in the process is changed for its own thread alone.

To trace a model, transformers, torch and this frontend put functions of their own in the place of others: in
registries, in modules, in classes. All of these belong to the whole process, where other threads run other models
meanwhile. So what is put there asks which thread calls it, and the others get what was there before.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import ChainMap
from collections.abc import Callable, Generator, Iterator, Mapping, MutableMapping
from typing import Any

Function = Callable[..., Any]

_TRACING = threading.RLock()
_ABSENT = object()


@contextlib.contextmanager
def alone() -> Generator[None]:
    """Trace in one thread at a time; others wait.

    torch's tracer, its fake tensors and its exporter keep their state in the process: two traces at once would find
    each other's.
    """
    with _TRACING:
        yield


def here(ours: Function, others: Function) -> Function:
    """A function that is one in this thread, and another in all others."""
    thread = threading.get_ident()

    @functools.wraps(others)
    def choose(*args: Any, **kwargs: Any) -> Any:
        return (ours if threading.get_ident() == thread else others)(*args, **kwargs)

    return choose


@contextlib.contextmanager
def replaced(owner: Any, name: str, make: Callable[[Any], Function], others: Function | None = None) -> Generator[None]:
    """Replace a function of a module or class, for this thread, for as long as the block lasts.

    Args:
        owner: The module or class.
        name: What the function is called there.
        make: Makes the new function of the one that is there.
        others: What other threads call meanwhile; what is there by default.
    """
    own = vars(owner).get(name, _ABSENT)  # not what the class inherits, and not bound
    before = getattr(owner, name)
    setattr(owner, name, here(make(before), others or before))
    try:
        yield
    finally:
        if own is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


class Overlaid(MutableMapping[str, Any]):
    """A mapping that holds more in this thread than in others; whatever anybody adds meanwhile goes to `base`.

    Args:
        base: What the others see.
        ours: What this thread sees in front of it.
    """

    def __init__(self, base: MutableMapping[str, Any], ours: Mapping[str, Any]) -> None:
        self._base = base
        self._both = ChainMap(dict(ours), base)
        self._thread = threading.get_ident()

    def _seen(self) -> MutableMapping[str, Any]:
        return self._both if threading.get_ident() == self._thread else self._base

    def __getitem__(self, key: str) -> Any:
        return self._seen()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._seen())

    def __len__(self) -> int:
        return len(self._seen())

    def __setitem__(self, key: str, value: Any) -> None:
        self._base[key] = value

    def __delitem__(self, key: str) -> None:
        del self._base[key]
