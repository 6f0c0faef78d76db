"""Plant each fault in a copy of the source, run the properties on it, and print who told."""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.kill.edit import EditError, find, replaced
from tests.kill.table import FAULTS, PROPERTIES, Fault

ROOT = Path(__file__).parents[2]
SHARED = (
    "hypothesis.stateful", "onnx.reference", "onnx_ir.passes.common", "onnxruntime", "onnxscript.optimizer",
    "onnxscript.rewriter", "onnxscript.version_converter", "pytest", "torch.export", "torch.onnx",
    "transformers.cache_utils", "transformers.exporters.exporter_onnx", "transformers.masking_utils",
)  # fmt: skip
"""What every copy imports."""
COPIED = ("qeff_ir", "passes", "backends", "benchmarks", "tests", "pyproject.toml")


def plant(fault: Fault | None, folder: Path) -> None:
    """Copy the source, with the fault.

    Raises:
        SystemExit: What the fault replaces stands nowhere, or more than once.
    """
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in COPIED:
        source = ROOT / name
        shutil.copytree(source, folder / name, ignore=ignore) if source.is_dir() else shutil.copy(source, folder / name)
    if fault is None:
        return
    try:
        place = find(ROOT, fault.where)
        path = folder / place.file
        path.write_text(replaced(path.read_text(), place.inner, fault.old, fault.new))
    except EditError as error:
        sys.exit(f"fault '{fault.name}': {error}")


def told(folder: Path, properties: list[str]) -> dict[str, bool]:
    """Which of the properties tell that something is wrong in a copy; runs in a process of its own."""
    result = folder / "told.json"
    gc.collect()  # a fork has no threads of its parent's sessions, and could not end them
    child = os.fork()
    if child == 0:
        code = 1
        try:
            _test(folder, properties, result)
            code = 0
        finally:
            os._exit(code)
    os.waitpid(child, 0)
    # A copy that cannot even be imported, or that brings the process down, is told by every property.
    return json.loads(result.read_text()) if result.is_file() else dict.fromkeys(properties, True)


def _test(folder: Path, properties: list[str], result: Path) -> None:
    import pytest

    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(folder)
    sys.path[:] = [str(folder), *(p for p in sys.path if p not in ("", str(ROOT)))]
    for name in [n for n in sys.modules if n.split(".")[0] in COPIED]:
        del sys.modules[name]
    os.environ["HYPOTHESIS_PROFILE"] = "kill"
    os.environ["QEFF_BUNDLES"] = str(folder / "bundles")
    found: dict[str, bool] = {}
    for name in properties:
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", f"tests/{PROPERTIES[name]}"])
        found[name] = code in (1, 2, 3)
        if code not in (0, 1, 2, 3):
            raise RuntimeError(f"no test is called {PROPERTIES[name]}")
        result.write_text(json.dumps(found))


def sound(properties: list[str]) -> list[str]:
    """Properties that tell of a copy without a fault: none may."""
    with tempfile.TemporaryDirectory() as name:
        plant(None, Path(name))
        return [p for p, caught in told(Path(name), properties).items() if caught]


def main() -> int:
    """See the package."""
    parser = argparse.ArgumentParser(prog="python -m tests.kill", description=__doc__)
    parser.add_argument("--all", action="store_true", help="run every property on every fault")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="faults to plant")
    parser.add_argument(
        "--unchecked", action="store_true", help="do not run the properties on the source as it is first"
    )
    parser.add_argument("--json", type=Path, help="also write the table here")
    given = parser.parse_args()
    unknown = set(given.only or ()) - {f.name for f in FAULTS}
    if unknown:
        parser.error(f"no fault is called '{min(unknown)}'")
    faults = [f for f in FAULTS if given.only is None or f.name in given.only]
    os.environ["HF_HUB_OFFLINE"] = "1"
    for module in SHARED:  # imported once, before the processes part; nothing of the project is
        importlib.import_module(module)
    transformers = importlib.import_module("transformers")
    assert transformers.PreTrainedModel and transformers.AutoModelForCausalLM  # which it imports when asked
    if not given.unchecked:
        wrong = sound(sorted({f.by for f in faults}))
        if wrong:
            print(f"the source as it is does not pass {', '.join(wrong)}: nothing can be learnt from planting faults")
            return 1
    table: dict[str, dict[str, bool]] = {}
    for fault in faults:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as name:
            plant(fault, Path(name))
            others = [p for p in PROPERTIES if p != fault.by]
            caught = told(Path(name), [fault.by, *others] if given.all else [fault.by])
        table[f"{fault.where}: {fault.name}"] = caught
        told_by = ", ".join(p for p, yes in caught.items() if yes) or "NOBODY"
        print(f"{fault.where:50} {fault.name:40} {told_by} ({time.perf_counter() - started:.0f} s)", flush=True)
        if given.json is not None:
            given.json.write_text(json.dumps(table, indent=2) + "\n")
    alive = [f"{f.where}: {f.name} (by {f.by})" for f in faults if not table[f"{f.where}: {f.name}"][f.by]]
    print(f"{len(faults) - len(alive)} of {len(faults)} faults told by the property named for them")
    print("".join(f"  survived: {name}\n" for name in alive), end="")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
