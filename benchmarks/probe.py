"""One measurement of `benchmarks.memory`, in a process of its own: ``python -m benchmarks.memory_probe FOLDER STAGE``.

Prints one JSON object per stage up to STAGE (``import``, ``lower``, ``passes``, ``emit``).
"""

from __future__ import annotations

import json
import re
import resource
import sys
import tempfile
import time
from pathlib import Path

STAGES = ("import", "lower", "passes", "emit")


def main(folder: Path, last: str) -> None:
    """Run the stages one after the other; peak memory never falls, so each line tells the peak so far."""
    started = time.perf_counter()

    def done(stage: str, nodes: float | None = None) -> None:
        nonlocal started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        row = {"stage": stage, "peak MB": peak, "seconds": time.perf_counter() - started, "nodes/layer": nodes}
        print(json.dumps(row), flush=True)
        if stage == last:
            sys.exit()
        started = time.perf_counter()

    import torch  # noqa: F401  # the baseline is what importing costs
    import transformers

    from backends.base import CompileOptions
    from backends.onnxruntime import BACKEND
    from benchmarks.prepare import finish, lowered
    from qeff_ir.frontend.checkpoint import open_checkpoint
    from qeff_ir.frontend.skeleton import build_skeleton
    from qeff_ir.frontend.weights import checkpoint_weights
    from qeff_ir.module import SOURCE_KEY, Module

    def per_layer(module: Module) -> float:
        """Nodes that come from inside a decoder layer, per layer."""
        sources = [node.metadata_props.get(SOURCE_KEY, "") for node in module.graph]
        layers = [match[0] for s in sources if (match := re.search(r"\.\d+(\.|$)", s))]
        return len(layers) / max(1, len({layer.strip(".") for layer in layers}))

    done("import")
    model = build_skeleton(transformers.AutoConfig.from_pretrained(folder))
    options = CompileOptions(ctx_len=1024)
    module = lowered(model, checkpoint_weights(model, open_checkpoint(folder)))
    done("lower", per_layer(module))
    finish(module, options)
    done("passes", per_layer(module))
    # Beside the checkpoint, so that its files can be linked.
    with tempfile.TemporaryDirectory(dir=folder) as package:
        BACKEND.emit(module, Path(package), options)
        done("emit", per_layer(module))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
