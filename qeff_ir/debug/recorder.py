"""The data of a report: what the manager tells, plus the diff of every pass and the origin of every final node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from qeff_ir.debug.bundle import describe
from qeff_ir.debug.diff import diff, text_diff
from qeff_ir.ir.module import PASS_KEY, Module
from qeff_ir.ir.sources import source_text, sources_of
from qeff_ir.passing.base import Pass
from qeff_ir.passing.instrument import Instrument
from qeff_ir.passing.pipeline import Pipeline
from qeff_ir.passing.report import PassRun, Report


class Recorder(Instrument):
    """Collects, while a pipeline runs, what a report shows beyond `Report.to_json`.

    Attributes:
        data: The report as plain data once the pipeline has ended, or failed: `Report.to_json` with ``model``, a
            ``diff`` in each pass (with ``text``: how the text form differs), ``origins``, one entry for each Hugging
            Face module and pass of the final graph, and ``failed``: pass, class, code and message of the error, and the
            bundle where one was written, or `None`. A failing pass that an instrument found wrong is among the passes,
            with what it changed; one that did not get to its end is not.
    """

    def __init__(self) -> None:
        self._before: Module | None = None
        self._diffs: dict[str, dict[str, Any]] = {}
        self._makers: dict[str, str] = {}
        self._report = Report("")
        self.data: dict[str, Any] = {}

    def before_pipeline(self, module: Module, pipeline: Pipeline) -> None:
        """Start anew."""
        self._before, self._diffs, self._makers, self.data = None, {}, {}, {}
        self._report = Report(str(pipeline))

    def before_pass(self, id: str, item: Pass, module: Module) -> None:
        """Keep the module; weights are shared, so this costs a graph."""
        self._before = module.clone()

    def after_pass(self, run: PassRun, module: Module) -> None:
        """Note what changed; what a pass added is its own, even where a library stamped it as its forerunner's."""
        assert self._before is not None
        found = diff(self._before, module).to_json()
        for change in found["nodes"]:
            if change["kind"] == "added":
                self._makers[change["name"]] = run.id
            change["made_by"] = self._makers.get(change["name"], change["made_by"])
        found["text"] = text_diff(self._before, module) if run.modified else []
        self._diffs[run.id] = found
        self._report.runs.append(run)

    def failed(self, id: str, item: Pass, module_before: Module, error: BaseException) -> None:
        """Put together what there is."""
        kind, code = describe(error)
        self._finish(self._report, module_before)
        self.data["failed"] = {"id": id, "error": kind, "code": code, "message": str(error), "bundle": None}

    def after_pipeline(self, report: Report, module: Module) -> None:
        """Put all together."""
        self._finish(report, module)

    def _finish(self, report: Report, module: Module) -> None:
        found = origins(module, self._makers)
        self.data = {"model": module.name, **report.to_json(), "failed": None, "origins": found}
        for entry in self.data["passes"]:
            entry["diff"] = self._diffs[entry["id"]]


def origins(module: Module, makers: Mapping[str, str]) -> list[dict[str, Any]]:
    """Where the nodes of a graph come from: operators counted by Hugging Face module and pass.

    Args:
        module: The graph.
        makers: Pass that made a node, by the name of its result; else what the node's metadata says.
    """
    found: dict[tuple[str, str], Counter[str]] = {}
    each: dict[str, tuple[str, ...]] = {}
    for node in module.graph:
        made_by = makers.get(node.outputs[0].name or "") or node.metadata_props.get(PASS_KEY, "")
        key = source_text(node), made_by
        each[key[0]] = sources_of(node)
        op = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        found.setdefault(key, Counter())[op] += 1
    return [{"source": s, "sources": list(each[s]), "pass": p, "ops": dict(ops)} for (s, p), ops in found.items()]
