"""The instrument that writes a bundle when a pass fails."""

from __future__ import annotations

import re
from pathlib import Path

from qeff_ir.debug.bundle import Metadata, describe, versions, write_bundle
from qeff_ir.debug.drive import Answers, drive, make_plan
from qeff_ir.errors import QeffError
from qeff_ir.ir.module import Module
from qeff_ir.passing.base import Pass
from qeff_ir.passing.instrument import Instrument
from qeff_ir.passing.pipeline import Pipeline

_ODD, _LONGEST = re.compile(r"[^\w.+-]"), 80
"""What the name of a module may have and that of a folder may not, and how much of it is taken."""


class Capture(Instrument):
    """Writes one bundle for the pass that fails, whatever way it fails.

    Attributes:
        written: The bundle; `None` while nothing has failed.

    Args:
        folder: Where to; a new folder below the cache's ``bundles`` by default.
        check: The check level of the run, which a replay uses again.
        seed: Of the trace.
    """

    def __init__(self, folder: Path | None = None, *, check: int = 1, seed: int = 0) -> None:
        self._folder = folder
        self._check = check
        self._seed = seed
        self._pipeline = Pipeline()
        self._start: Module | None = None
        self.written: Path | None = None

    def before_pipeline(self, module: Module, pipeline: Pipeline) -> None:
        """Keep what the pipeline starts from; weights are shared, so this costs a graph."""
        self._pipeline, self._start, self.written = pipeline, module.clone(), None

    def failed(self, id: str, item: Pass, module_before: Module, error: BaseException) -> None:
        """Write the bundle; an interrupt by the user is no failure."""
        if not isinstance(error, Exception):
            return
        assert self._start is not None
        ids = [name for name, _ in self._pipeline]
        suffix = Pipeline(self._pipeline.passes[ids.index(id) :])
        kind, code = describe(error)
        text = str(self._pipeline), str(suffix)
        metadata = Metadata(id, *text, self._check, self._seed, kind, code, str(error), versions())
        folder = self._folder or default_folder(module_before.name, id)
        self.written = write_bundle(folder, metadata, module_before, self._start, _trace(module_before, self._seed))


def default_folder(model: str, id: str) -> Path:
    """A folder in the cache that no bundle has yet: ``bundles/MODEL-PASS-1``."""
    from qeff_ir.compiler import cache_root

    plain = _ODD.sub("_", model)[:_LONGEST].lstrip(".-") or "model"
    root, stem, number = cache_root() / "bundles", f"{plain}-{id.replace('#', '.')}", 1
    while (root / f"{stem}-{number}").exists():
        number += 1
    return root / f"{stem}-{number}"


def _trace(module: Module, seed: int) -> Answers | None:
    try:
        return drive(module, make_plan(module, seed))
    except QeffError:
        return None  # a module that cannot run is a failure worth keeping too
