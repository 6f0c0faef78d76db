"""``--bake-adapters NAME=FOLDER``: adapters that become weights of the package."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qeff_ir.cli.request import Request
from qeff_ir.errors import AdapterError

if TYPE_CHECKING:
    from qeff_ir.frontend.source import Source


def with_adapters(request: Request, named: Sequence[str], source: Source) -> Request:
    """What is asked for, with the passes for adapters in its pipeline.

    Args:
        request: The options.
        named: ``NAME=FOLDER`` of each adapter, number 1 first.
        source: The base model.

    Raises:
        AdapterError: A word is of another form, a name stands there twice, or an adapter cannot be read or is of
            another base model.
    """
    from backends import find_backend
    from qeff_ir.adapters.base_model import check_base
    from qeff_ir.adapters.folder import Adapter, check_name, open_adapter
    from qeff_ir.adapters.step import baked
    from qeff_ir.compiler import choose_target, chosen
    from qeff_ir.passing.pipeline import Pipeline

    loaded: dict[str, Adapter] = {}
    for word in named:
        name, equals, folder = word.partition("=")
        if not equals or not folder or name in loaded:
            raise AdapterError(f"--bake-adapters {word} names no adapter of its own: write NAME=FOLDER, each name once")
        check_name(name)
        loaded[name] = open_adapter(folder)
        check_base(name, loaded[name], source)
    target, _ = choose_target(request.target)
    steps = chosen(request.pipeline, Pipeline.parse(find_backend(target).pipeline))
    return dataclasses.replace(request, pipeline=str(steps.add(Pipeline(tuple(baked(loaded))))))
