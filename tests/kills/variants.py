"""What is built: packages of both targets, with adapters, weight-free, with a host table; results of qeff opt.

Each is built in two editions, from two checkpoints of other numbers. The model is lowered once, and passes run once for
each variant: an edition's module is that one with its weights in the other file. All else is the product's own code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from safetensors.numpy import load_file, save_file

from backends import find_backend
from qeff_ir import compiler
from qeff_ir.auto.causal_lm import QEFFAutoModelForCausalLM
from qeff_ir.compiler import TokenEmbedding, compile_model
from qeff_ir.frontend.providers.folder import Folder
from qeff_ir.frontend.source import Source
from qeff_ir.ir.module import Module
from qeff_ir.ir.printer import fingerprint
from qeff_ir.ir.snapshot import load_module, write_module
from qeff_ir.package import open_package
from qeff_ir.passing.manager import Report
from qeff_ir.ranges import file_range
from qeff_ir.replacement import put_right
from tests import support

Edition = str
"""``old`` or ``new``."""
OLD, NEW = "old", "new"

_LORA = "lora{n=3 rank=2 targets=.* bias=targets}"


SHAPES = {name: getattr(support.OPTIONS, name) for name in ("prefill_seq_len", "ctx_len", "batch_size")}
"""What every variant is compiled for."""


@dataclass(frozen=True)
class Variant:
    """One kind of build.

    Attributes:
        name: For people.
        target: The backend; none for a result of ``qeff opt``.
        adapters: Whether there are inputs for adapters.
        weight_free: See `backends.ai100.options.Ai100Options`.
        token_embedding: See `compile_model`.
        file: Of a result of ``qeff opt``: the name of the file in place of a folder.
    """

    name: str
    target: str | None = None
    adapters: bool = False
    weight_free: bool = False
    token_embedding: TokenEmbedding = "graph"
    file: str = "out"


VARIANTS = (
    Variant("onnxruntime", "onnxruntime"),
    Variant("onnxruntime, adapters", "onnxruntime", adapters=True),
    Variant("onnxruntime, host table", "onnxruntime", token_embedding="host"),
    Variant("ai100", "ai100"),
    Variant("ai100, weight-free", "ai100", weight_free=True),
    Variant("opt, folder"),
    Variant("opt, file", file="out.onnx"),
)


class _Known(Source):
    """A folder whose module is known."""

    def __init__(self, folder: Path, module: Module | None) -> None:
        super().__init__(Folder(folder))
        self._module = module

    def lower(self) -> Module:
        """See `Source.lower`."""
        if self._module is None:
            self._module = super().lower()
        return self._module.clone()


class Bench:
    """The two checkpoints, and how to build each variant from them.

    Args:
        root: An empty folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        folders = {edition: root / f"model-{edition}" for edition in (OLD, NEW)}
        model = support.tiny("llama")[1]
        for folder in folders.values():
            model.save_pretrained(folder)
        weights = load_file(folders[NEW] / "model.safetensors")
        changed = {name: array * np.float32(0.75) for name, array in weights.items()}
        save_file(changed, folders[NEW] / "model.safetensors", {"format": "pt"})
        first = _Known(folders[OLD], None)
        module = first.lower()
        self._files = {e: (f / "model.safetensors").resolve() for e, f in folders.items()}
        self._sources = {OLD: first, NEW: _Known(folders[NEW], self._moved(module, NEW))}
        self._done: dict[str, tuple[Module, Report]] = {}
        self._known: dict[tuple[str, Edition], object] = {}
        self._tokens: dict[tuple[str, Edition], object] = {}
        for variant in VARIANTS:
            self._prepare(variant)

    def build(self, variant: Variant, edition: Edition, out: Path) -> None:
        """Build a variant; by all of the product's code but the passes."""
        if variant.target is None:
            write_module(self._sources[edition].lower(), out)
            return

        def passes(module: Module, *_: Any) -> Report:
            done, report = self._done[variant.name]
            module.__dict__.update(self._moved(done, edition).__dict__)
            return report

        real, compiler.run_pipeline = compiler.run_pipeline, passes
        try:
            self._compile(variant, edition, out)
        finally:
            compiler.run_pipeline = real

    def edition(self, variant: Variant, out: Path) -> Edition | None:
        """Which edition is there, whole; `None` for nothing.

        Raises:
            Exception: There is something else.
        """
        put_right(out)
        if not out.exists():
            return None
        found = self._content(variant, out)
        for edition in (OLD, NEW):
            if self._known[variant.name, edition] == found:
                return edition
        raise ValueError(f"{out} is whole and of neither edition")

    def tokens(self, variant: Variant, edition: Edition, out: Path) -> object:
        """What a package answers, and what it answered when nobody was killed."""
        return self._answer(variant, edition, out), self._tokens[variant.name, edition]

    def answers(self, variant: Variant) -> bool:
        """Whether a variant runs by itself: what qeff opt writes is a module, which has no target."""
        return variant.target is not None

    def _prepare(self, variant: Variant) -> None:
        for edition in (OLD, NEW):
            out = self.root / "pristine" / variant.name / edition / variant.file
            if variant.target is None or edition == NEW:
                self.build(variant, edition, out)
            else:
                self._record(variant, out)
            self._known[variant.name, edition] = self._content(variant, out)

    def remember_tokens(self, ask: Callable[[Callable[[], object]], object]) -> None:
        """Take the answers of all packages; `ask` runs each in a process of its own."""
        for variant in filter(self.answers, VARIANTS):
            for edition in (OLD, NEW):
                out = self.root / "pristine" / variant.name / edition / variant.file
                self._tokens[variant.name, edition] = ask(lambda v=variant, e=edition, o=out: self._answer(v, e, o))
            assert self._tokens[variant.name, OLD] != self._tokens[variant.name, NEW]

    def _record(self, variant: Variant, out: Path) -> None:
        """Build, and keep what the passes made."""
        real = compiler.run_pipeline

        def passes(module: Module, *rest: Any) -> Report:
            report = real(module, *rest)
            self._done[variant.name] = module.clone(), report
            return report

        compiler.run_pipeline = passes
        try:
            self._compile(variant, OLD, out)
        finally:
            compiler.run_pipeline = real

    def _compile(self, variant: Variant, edition: Edition, out: Path) -> None:
        assert variant.target is not None
        own = {"weight_free": True} if variant.weight_free else {}
        pipeline = find_backend(variant.target).pipeline
        compile_model(
            self._sources[edition],
            {**SHAPES, **own},
            target=variant.target,
            out=out,
            pipeline=pipeline.replace("last-logits", f"last-logits,{_LORA}") if variant.adapters else pipeline,
            token_embedding=variant.token_embedding,
            emit_only=variant.target == "ai100",
        )

    def _content(self, variant: Variant, out: Path) -> object:
        """All that counts of what was built."""
        if variant.target is not None:
            manifest = open_package(out)
            return manifest.key, manifest.files, manifest.tables
        module = load_module(out if out.suffix == ".onnx" else out / "model.onnx")
        values = module.graph.initializers.values()
        tensors = {v.name: v.const_value.tobytes() for v in values if v.const_value is not None}
        return fingerprint(module), tensors

    def _answer(self, variant: Variant, edition: Edition, out: Path) -> list[Any]:
        model = QEFFAutoModelForCausalLM.from_package(out, checkpoint=self._sources[edition])
        decoder = model.runner(threads=1).decoder
        return decoder.prefill(support.PROMPTS).tolist()

    def _moved(self, module: Module, edition: Edition) -> Module:
        """A copy with its weights in the file of another edition."""
        moved = module.clone()
        for value in moved.graph.initializers.values():
            where = file_range(value.const_value)
            if where is not None:
                tensor = dataclasses.replace(where, file=self._files[edition]).tensor(value.name or "")
                assert isinstance(tensor, ir.LazyTensor)
                value.const_value = tensor
        return moved
