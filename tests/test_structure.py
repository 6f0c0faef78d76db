"""The structure of the code: imports have no cycle, and targets are asked for their traits, not for their names."""

from __future__ import annotations

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import ModuleType

import pytest

import qeff_ir
from backends import backend_names
from qeff_ir import passing

ROOT = Path(__file__).parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("qeff_ir", "passes", "backends")
    for path in sorted((ROOT / folder).rglob("*.py"))
}


def imports(name: str, path: Path) -> set[str]:
    """Modules of ours that a module imports, inside of functions and for type checkers alone too."""
    found: set[str] = set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) + 1 - node.level]) if node.level else ""
            base = ".".join(part for part in (base, node.module) if part)
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return (found & MODULES.keys()) - {name}


def graph() -> dict[str, set[str]]:
    return {name: imports(name, path) for name, path in MODULES.items()}


def test_imports_have_no_cycle() -> None:
    edges = graph()
    assert len(edges) > 150 and "qeff_ir.ir.module" in edges["qeff_ir.compiler"]
    tuple(TopologicalSorter(edges).static_order())


def test_a_cycle_would_be_told() -> None:
    edges = graph()
    edges["qeff_ir.ir.module"].add("qeff_ir.compiler")
    with pytest.raises(CycleError, match=r"qeff_ir\.compiler"):
        tuple(TopologicalSorter(edges).static_order())


LAYERS = """
    errors arrays home garbage reading
    digests replacement side_files sharing
    ranges widening quantized
    ir storage numerics
    package passing cost roofline
    frontend runtime adapters passes
    backends
    specialize target_options cache_key read_lengths
    requested_passes
    compiler debug
    auto exporter demo testing
    serve
    cli
"""
"""What may import what: packages and modules of `qeff_ir`, and the two beside it, the lowest layer first.

Inside of a layer, and of a package, only cycles of modules are forbidden.
"""
RANKS = {name: rank for rank, line in enumerate(LAYERS.split("\n")) for name in line.split()}


def layer(module: str) -> int:
    """The layer of a module; `qeff_ir` itself, which imports nothing before it is asked to, is below all."""
    parts = module.split(".")
    name = parts[1] if parts[0] == "qeff_ir" and len(parts) > 1 else parts[0]
    return -1 if name == "qeff_ir" else RANKS[name]


def upward(edges: dict[str, set[str]]) -> list[str]:
    return [f"{a} imports {b}" for a, to in edges.items() if a != "qeff_ir" for b in to if layer(b) > layer(a)]


def test_no_import_runs_upward() -> None:
    edges = graph()
    assert upward(edges) == []
    edges["qeff_ir.ir.module"].add("qeff_ir.passing.base")
    edges["backends.base"].add("qeff_ir.compiler")
    assert upward(edges) == ["qeff_ir.ir.module imports qeff_ir.passing.base", "backends.base imports qeff_ir.compiler"]


def test_no_file_outside_of_backends_asks_for_a_target_by_name() -> None:
    asked = re.compile(rf"""(==|!=|\bin)\s*\(?["']({"|".join(backend_names())})["']""")
    found = [name for name, path in MODULES.items() if asked.search(path.read_text())]
    assert [name for name in found if not name.startswith("backends.")] == []
    assert asked.search('if target == "ai100":')


PUBLIC = {
    qeff_ir: """QEFFAutoModel QEFFAutoModelForCTC QEFFAutoModelForCausalLM QEFFAutoModelForImageTextToText
        QEFFAutoModelForSeq2SeqLM QEFFAutoModelForSequenceClassification QEFFAutoModelForSpeechSeq2Seq
        QEFFAutoModelForTokenClassification QEffAutoLoraModelForCausalLM QEffAutoPeftModelForCausalLM
        QEffAutoPeftModelForImageTextToText QEffPeftModelForCausalLM""",
    passing: """AllSites AnyNumber AtLeast Dump Exactly Expect Instrument Missed OpBuilder Pass PassRun Phase Pipeline
        PrintIR Report Rewriter RulePass SurgeonPass register run_pipeline""",
}


@pytest.mark.parametrize("package", PUBLIC, ids=lambda package: package.__name__)
def test_public_names_are_these_and_type_checkers_know_them(package: ModuleType) -> None:
    """A name that goes, or moves away from here, breaks the code of others."""
    names = PUBLIC[package].split()
    assert sorted(package.__all__) == names
    stub = ast.parse(Path(str(package.__file__)).with_suffix(".pyi").read_text())
    known = [alias.asname for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted(map(str, known)) == names
    assert all(getattr(package, name).__name__ == name for name in names)
