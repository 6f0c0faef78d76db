"""Thirty tries; `python -m tests.kills` does as many as you like."""

from __future__ import annotations

import pytest

from tests.kills.engine import Engine, Try
from tests.kills.harm import Harm
from tests.kills.variants import VARIANTS


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QEFF_HOME", "")
        return Engine(tmp_path_factory.mktemp("kills"), seed=4)


def test_a_build_that_is_killed_or_fails_loses_nothing_and_leaves_nothing(engine: Engine) -> None:
    wrong: dict[str, list[str]] = {}
    for _ in range(30):
        this = engine.draw()
        if found := engine.run(this):
            wrong[str(this)] = found
    assert wrong == {}
    counts = engine.counts
    assert counts["killed"] >= 10 and counts["found old"] and counts["found new"] and counts["asked"]
    assert sum(n for what, n in counts.items() if what.startswith("error") and what.endswith("with 2")) >= 2


def test_the_engine_sees_what_is_lost(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what puts a folder back."""
    monkeypatch.setattr("tests.kills.variants.put_right", lambda _: None)
    monkeypatch.setattr("qeff_ir.replacement._put_right", lambda _: None)
    monkeypatch.setattr("qeff_ir.replacement.put_right", lambda _: None)
    variant = VARIANTS[0]
    count, _ = engine._clean(variant, True, False)
    found = (engine.run(Try(variant, True, False, Harm("kill", at), False)) for at in range(count, 1, -1))
    assert any(text.startswith("lost") for texts in found for text in texts)  # stops at the first
