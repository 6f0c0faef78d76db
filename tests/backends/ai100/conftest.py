from __future__ import annotations

import shutil
import stat
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from backends.ai100 import sdk
from backends.ai100.backend import BACKEND
from backends.ai100.options import Ai100Options
from qeff_ir.ir.module import Module

OPTIONS = Ai100Options(prefill_seq_len=8, ctx_len=40, batch_size=2)


@dataclass
class Tiny:
    """A tiny random model with sliding windows, lowered and emitted once."""

    model: PreTrainedModel
    module: Module
    folder: Path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    from qeff_ir.frontend.checkpoint.weights import memory_weights
    from qeff_ir.frontend.export.lower import lower
    from qeff_ir.passing.manager import run_pipeline
    from qeff_ir.passing.pipeline import Pipeline
    from qeff_ir.specialize import specialize
    from tests.models import build

    _, model = build("mistral")
    module = lower(model, memory_weights(model))
    specialize(module, OPTIONS)
    run_pipeline(module, Pipeline.parse(BACKEND.pipeline))
    BACKEND.check(module, OPTIONS)
    folder = tmp_path_factory.mktemp("tiny")
    BACKEND.emit(module, folder, OPTIONS)
    return Tiny(model, module, folder)


@pytest.fixture(scope="session")
def _forward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from qeff_ir.frontend.forward_source import ForwardOptions, ForwardSource
    from qeff_ir.frontend.providers.memory import Memory
    from qeff_ir.frontend.tasks import EMBEDDING
    from qeff_ir.passing.manager import run_pipeline
    from qeff_ir.passing.pipeline import Pipeline
    from qeff_ir.specialize import specialize
    from tests.encoders import build

    module = ForwardSource(Memory(build("distilbert")), ForwardOptions(EMBEDDING)).lower()
    options = Ai100Options(batch_size=2, seq_len=(8, 16))
    specialize(module, options)
    pipeline = Pipeline.parse(BACKEND.pipeline).without("last-logits")
    run_pipeline(module, pipeline.insert_before("fuse-norms", "embedding"))
    BACKEND.check(module, options)
    folder = tmp_path_factory.mktemp("forward")
    BACKEND.emit(module, folder, options)
    return folder


@pytest.fixture
def forward(_forward: Path, tmp_path: Path) -> Path:
    """A copy of an emitted text encoder, for texts of 8 and 16 tokens, that a test may damage."""
    return Path(shutil.copytree(_forward, tmp_path / "forward"))


@pytest.fixture(scope="session")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An emitted decoder with two slots for adapters of rank 2 or less; not to be damaged."""
    from qeff_ir.passing.manager import run_pipeline
    from qeff_ir.passing.pipeline import Pipeline
    from qeff_ir.specialize import specialize
    from tests import support

    module = support.lowered("llama")
    specialize(module, OPTIONS)
    step = 'lora{mode=slots n=2 rank=2 targets="q_proj,v_proj" retained=true}'
    run_pipeline(module, Pipeline.parse(BACKEND.pipeline).insert_after("last-logits", step))
    BACKEND.check(module, OPTIONS)
    folder = tmp_path_factory.mktemp("adapted")
    BACKEND.emit(module, folder, OPTIONS)
    (folder / "qpc").mkdir()
    (folder / "qpc" / "programqpc.bin").touch()
    return folder


@pytest.fixture
def folder(tiny: Tiny, tmp_path: Path) -> Path:
    """A copy of the emitted folder that a test may damage."""
    return Path(shutil.copytree(tiny.folder, tmp_path / "package"))


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in compiler that the backend finds; a sibling of another name acts as that SDK's compiler."""
    path = tmp_path / "bin" / "qaic-compile"
    path.parent.mkdir()
    root = Path(__file__).parents[3]
    script = Path(__file__).with_name("stand_in_qaic_compile.py")
    path.write_text(
        f"#!{sys.executable}\nimport runpy, sys\nsys.path.insert(0, {str(root)!r})\n"
        f"sys.exit(runpy.run_path({str(script)!r})['main'](sys.argv))\n"
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv(sdk.COMPILER_VARIABLE, str(path))
    return path
