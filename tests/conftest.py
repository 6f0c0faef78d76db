"""Settings that hold for every test, and the tiny models."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

from qeff_ir.ir.module import Module
from tests import support

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Tiny models gain nothing from a second thread, and lose much by waiting for one on a machine shared with others.
torch.set_num_threads(1)

settings.register_profile("pr", derandomize=True, database=None, deadline=None, print_blob=True, max_examples=30)
settings.register_profile("dev", deadline=None, max_examples=200)
# New examples only: those that are written down run with every other profile (`tests.nightly` runs slices of this one).
settings.register_profile(
    "nightly",
    deadline=None,
    database=None,
    print_blob=True,
    max_examples=int(os.environ.get("QEFF_EXAMPLES", "5000")),
    phases=[Phase.generate, Phase.target, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "hunt", deadline=None, print_blob=True, max_examples=100_000, suppress_health_check=list(HealthCheck)
)
# Says whether a fault is caught, not by which smallest example (`tests.kill`).
settings.register_profile(
    "kill", settings.get_profile("pr"), phases=[Phase.explicit, Phase.generate], report_multiple_bugs=False
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "pr"))


@pytest.fixture(scope="session", autouse=True)
def _cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Packages go to a folder of this run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QEFF_HOME", str(tmp_path_factory.mktemp("qeff-home")))
        yield


@pytest.fixture(scope="session")
def tiny() -> Callable[[str], tuple[PreTrainedConfig, PreTrainedModel]]:
    """``tiny(name)``: a model of `tests.models`, the same object for the whole run. Do not change it."""
    return support.tiny


@pytest.fixture(scope="session")
def lowered() -> Callable[[str], Module]:
    """``lowered(name)``: a fresh clone of that model's module, lowered once in the whole run."""
    return support.lowered
