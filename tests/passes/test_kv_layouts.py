"""The layouts of caches are those that the targets register, whatever was imported before."""

from __future__ import annotations

import subprocess
import sys

import pytest

from passes.kv_layouts import LAYOUTS, layout
from passes.kv_retention import KVRetention
from qeff_ir.errors import PassError, PipelineError
from qeff_ir.passing import Pipeline, run_pipeline
from tests import support


@pytest.mark.parametrize("layout", ["scatter", "tensor-scatter"])
def test_a_pass_that_is_imported_alone_knows_the_layouts(layout: str) -> None:
    code = f"""
from passes.kv_retention import KVRetention
from qeff_ir.passing import Pipeline
text = str(Pipeline((KVRetention(layout={layout!r}),)))
assert Pipeline.parse(text).passes == (KVRetention(layout={layout!r}),), text
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_layout_that_nobody_registered_is_refused() -> None:
    module = support.canonical("llama")
    with pytest.raises(PipelineError, match=r"'scater' is no value for 'layout', which takes scatter\|tensor-scatter"):
        Pipeline.parse("kv-retention{layout=scater}")
    with pytest.raises(PassError, match="there is no layout 'scater'; did you mean 'scatter'"):
        run_pipeline(module, Pipeline((KVRetention(layout="scater"),)))


def test_a_name_is_one_layouts_own() -> None:
    before = LAYOUTS["scatter"]
    with pytest.raises(PipelineError, match="two layouts are named 'scatter'"):
        layout("scatter")(type("Other", (before,), {}))
    assert LAYOUTS["scatter"] is before
