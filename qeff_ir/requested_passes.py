"""The passes that options of `compile` ask for, in a target's pipeline."""

from __future__ import annotations

from collections.abc import Iterable

from backends.base import Backend
from backends.options import CompileOptions
from qeff_ir.errors import CompileError
from qeff_ir.passing.pipeline import Pipeline
from qeff_ir.read_lengths import read_lengths


def with_requested(steps: Pipeline, options: CompileOptions, backend: Backend) -> Pipeline:
    """The pipeline of a decoder with what its options ask for.

    Raises:
        CompileError: An option cannot be met.
        PipelineError: The pipeline lacks a pass that an option is of.
    """
    drafts = sorted(set(options.num_speculative_tokens))
    if drafts == [0]:
        raise CompileError("num_speculative_tokens=0 verifies no draft: give at least 1, or leave it out")
    if drafts:
        keep = drafts[0] + 1 if len(drafts) == 1 else _text(number + 1 for number in drafts)
        steps = steps.with_options("last-logits", keep=keep)
    if options.retain_full_kv:
        steps = steps.with_options("kv-retention", ring="off")
    if (lengths := read_lengths(options)) is not None:
        prefill, decode = (_text(numbers) for numbers in lengths)
        made = f'compute-context-length{{prefill="{prefill}" decode="{decode}"}}'
        steps = steps.insert_after(backend.lengths_behind, made)
    if options.kv_cache_prefix:
        steps = steps.add(
            Pipeline.parse("kv-cache-prefix").with_options("kv-cache-prefix", prefix=options.kv_cache_prefix)
        )
    if options.full_batch_size:
        rows = options.kv_cache_batch_size or options.full_batch_size
        steps = steps.add(f"continuous-batching{{rows={rows}}}")
    return steps


def _text(numbers: Iterable[int]) -> str:
    return ",".join(map(str, numbers))
