from __future__ import annotations

import pytest

from . import wrong_passes


@pytest.fixture(autouse=True)
def _wrong_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wrong passes are known in these tests only."""
    wrong_passes.register_all(monkeypatch)
