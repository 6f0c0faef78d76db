"""One measurement in a process of its own: ``python -m benchmarks.probe FOLDER TARGET``.

Compiles the model of a folder as far as an emitted package, opened where the target is ONNX Runtime and `--open` is
given, and prints one JSON object per stage: seconds, those of the processor, and the peak resident memory of the
process so far in MB.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def main(folder: Path, target: str, opened: bool) -> None:
    """Run the stages one after the other."""
    started, spent = time.perf_counter(), 0.0

    def done(stage: str, **more: Any) -> None:
        nonlocal started, spent
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        took = {"seconds": time.perf_counter() - started, "cpu": time.process_time() - spent}
        print(json.dumps({"stage": stage, **took, "peak MB": peak, **more}), flush=True)
        started, spent = time.perf_counter(), time.process_time()

    import torch

    from backends import find_backend
    from backends.options import CompileOptions
    from qeff_ir.frontend.source import open_source
    from qeff_ir.passing.manager import run_pipeline
    from qeff_ir.passing.pipeline import Pipeline
    from qeff_ir.specialize import specialize

    torch.set_num_threads(1)
    done("import")
    backend, options = find_backend(target), CompileOptions(ctx_len=1024)
    module = open_source(folder).lower()
    done("lower", nodes=len(module.graph))
    specialize(module, options)
    report = run_pipeline(module, Pipeline.parse(backend.pipeline))
    done("passes", nodes=len(module.graph), passes={run.id: run.seconds for run in report.runs})
    with tempfile.TemporaryDirectory(dir=folder) as name:  # beside the checkpoint, so that its files can be shared
        package = Path(name)
        backend.emit(module, package, options)
        files = [path for path in package.rglob("*") if path.is_file()]
        own = sum(path.stat().st_blocks * 512 for path in files if path.stat().st_nlink == 1)
        done("emit", files=len(files), own=own, linked=sum(p.stat().st_size for p in files) - own)
        if opened:
            backend.open(package, threads=1)
            done("open")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], "--open" in sys.argv[3:])
