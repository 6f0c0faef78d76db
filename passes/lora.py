"""Give linear and embedding layers a low-rank branch whose factors are inputs: adapters without a recompilation."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import onnx_ir as ir

from qeff_ir.adapters.layers import Layer, bias_name, encoder_nodes, find_layers, layers_without_weight, output_layer
from qeff_ir.adapters.targets import select, selection
from qeff_ir.errors import PassError
from qeff_ir.ir.module import Module
from qeff_ir.ir.ports import ADAPTER_ROW, POSITIONS, name_of
from qeff_ir.ir.residents import Part, Resident
from qeff_ir.passing.base import OpBuilder, Pass, Phase, Rewriter, register
from qeff_ir.passing.expect import AtLeast, Expect


@register
@dataclass(frozen=True, slots=True)
class Lora(Pass):
    """Add ``x A B`` to what layers return, with the factors ``A`` and ``B`` as graph inputs.

    ``mode=single`` has one adapter for all rows, its inputs named as PEFT names the tensors (AI 100 contract §6.1).
    ``mode=slots`` has ``n`` adapters and the base model in slot 0, stacked ``[n + 1, in, rank]`` and ``[n + 1, rank,
    out]``, and the input ``lora_ids`` that selects the slot of each row. Factors of a smaller rank are padded with
    zeros; the scaling is a part of ``B``.

    Layers are named as in PEFT's configurations: by ``all-linear``, by names or endings of names separated by commas,
    or by a regular expression; ``exclude``, ``layers`` and ``layers-pattern`` are ``exclude_modules``,
    ``layers_to_transform`` and ``layers_pattern``.

    ``bias=targets`` gives those layers a bias of the adapter's, ``bias=all`` gives one to every bias of the model.
    An encoder of pictures in the graph gets no branch: its rows are not those of the batch.

    ``retained=true`` returns every input as an output, as devices want it that keep inputs between runs.
    """

    name: ClassVar[str] = "lora"
    phase: ClassVar[Phase] = Phase.ADAPT
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    changes_interface: ClassVar[bool] = True
    expect: ClassVar[Expect] = AtLeast(1)

    mode: Literal["single", "slots"] = field(default="slots", metadata={"help": "one adapter, or one for each row"})
    n: int = field(default=4, metadata={"help": "slots beside the base model's"})
    rank: int = field(default=16, metadata={"help": "largest rank of an adapter"})
    targets: str = field(default="all-linear", metadata={"help": "layers that get a branch"})
    exclude: str = field(default="", metadata={"help": "layers that get none"})
    layers: str = field(default="", metadata={"help": "decoder layers, as numbers separated by commas; all by default"})
    layers_pattern: str = field(default="", metadata={"help": "name of the list of decoder layers"})
    bias: Literal["none", "targets", "all"] = field(default="none", metadata={"help": "biases of the adapter's own"})
    retained: bool = field(default=False, metadata={"help": "return the inputs as outputs"})

    def run(self, module: Module, rewriter: Rewriter) -> None:
        """Add the branches.

        Raises:
            PassError: A size is not positive, no layer is named so, or the module has adapters already.
        """
        if self.n < 1 or self.rank < 1:
            raise PassError(f"n={self.n} and rank={self.rank} must be at least 1")
        if module.adapters:
            raise PassError("the module has adapter inputs already: put lora into the pipeline once")
        found = find_layers(module)
        chosen = self._chosen(module, found)
        lost = layers_without_weight(module)
        named = self._of(lost, lost) if lost else set[str]()
        for path in (path for path in lost if path in named):
            reason = f"{path} has no weight of its own any more: put lora before the pass that took it"
            rewriter.missed(lost[path], reason)
        if not chosen:
            names = ", ".join(sorted({layer.path.rpartition(".")[2] for layer in found}))
            near = difflib.get_close_matches(self.targets.replace("\\", ""), [layer.path for layer in found], n=1)
            first = f" (one is {near[0]})" if near else ""
            raise PassError(f"no layer is named '{self.targets}': the layers of {module.name} end in {names}{first}")
        branches = _Branches(self, module, rewriter)
        for layer in found:
            if layer.path in chosen and rewriter.rewrite(layer.kind):
                branches.low_rank(layer)
        if self.bias == "all":
            biased, apart = ("Add", "LayerNormalization"), encoder_nodes(module)
            for node in [node for node in module.graph if node.op_type in biased and node not in apart]:
                owner = next((name for v in node.inputs if (name := bias_name(v)) is not None), None)
                if owner is not None and owner not in chosen and rewriter.rewrite("bias"):
                    branches.bias_alone(node, owner)
        if self.retained:
            branches.retain()
        rewriter.sweep()

    def _chosen(self, module: Module, found: list[Layer]) -> set[str]:
        paths = dict.fromkeys(layer.path for layer in found)
        head = output_layer(module, found)
        return self._of(paths, (layer.path for layer in found if layer.kind == "linear" and layer.path != head))

    def _of(self, paths: Iterable[str], linear: Iterable[str]) -> set[str]:
        """Those of the paths that the options name; ``all-linear`` means `linear`."""
        try:
            layers = [int(word) for word in self.layers.split(",")] if self.layers else None
        except ValueError as error:
            raise PassError(f"layers={self.layers} is no list of numbers separated by commas") from error
        config = selection(self.targets, exclude=self.exclude, layers=layers, pattern=self.layers_pattern)
        return set(select(config, paths, dict.fromkeys(linear)))


class _Branches:
    """Writes the branches of one module."""

    def __init__(self, options: Lora, module: Module, rewriter: Rewriter) -> None:
        self.options = options
        self.slots = options.mode == "slots"
        self.module = module
        self.rewriter = rewriter
        self.inputs: dict[str, ir.Value] = {}
        if self.slots:
            ids = ir.val(name_of(ADAPTER_ROW), shape=ir.Shape(["batch_size", 1]), dtype=ir.DataType.INT64)
            self.ids = module.declare(ids, ADAPTER_ROW)
            module.graph.inputs.append(self.ids)
            b = rewriter.at(next(iter(module.graph)))
            # Idle rows have -1, which is no slot.
            self.rows = b("Max", b("Squeeze", self.ids, b.const([1])), b.const([0]))

    def low_rank(self, layer: Layer) -> None:
        """Add the branch of one layer, before its bias, which runtimes fuse with what follows it."""
        size, width = layer.features
        rank = self.options.rank
        b = self.rewriter.at(layer.node)
        a_shape, b_shape = ((size, rank), (rank, width)) if self.slots else ((rank, size), (width, rank))
        factor_a = self._input(layer.path, layer.kind, "a", a_shape)
        factor_b = self._input(layer.path, layer.kind, "b", b_shape)
        narrow = self._looked_up(layer, factor_a, b) if layer.kind == "embedding" else self._product(layer, factor_a, b)
        delta = b("MatMul", narrow, self._of_row(factor_b, layer, b))
        if self._is_flat(layer):
            delta = b("Reshape", delta, b.const([-1, width]))
        total = self._plus(layer.node, delta, b)
        if self.options.bias != "none":
            bias = self._input(layer.path, layer.kind, "bias", (width,))
            total = self._plus_bias(total, layer.node, bias, b, flat=self._is_flat(layer))
        self.rewriter.substitute(layer.node, total)

    def bias_alone(self, node: ir.Node, owner: str) -> None:
        """Add a bias to a node that has one of the model's."""
        b = self.rewriter.at(node)
        shape = next(v.shape for v in node.inputs if bias_name(v) == owner and v is not None)
        assert shape is not None
        bias = self._input(owner, "linear", "bias", (int(shape.numpy()[-1]),))
        copy = self._again(node, b)
        self.rewriter.substitute(node, self._plus_bias(copy, node, bias, b, flat=_rank(node) == 2))

    def retain(self) -> None:
        """Return every adapter input as an output."""
        graph = self.module.graph
        for item in self.module.adapters:
            value = self.inputs[item.input]
            kept = ir.node("Identity", [value], name=f"{item.input}_identity")
            self.rewriter.stamp(kept, kept)
            graph.append(kept)
            out = kept.outputs[0]
            out.name, out.shape, out.type = item.output, value.shape, value.type
            graph.outputs.append(out)

    def _input(self, path: str, kind: str, part: Part, shape: tuple[int, ...]) -> ir.Value:
        if self.slots:
            made, shape = f"lora-{part}", (self.options.n + 1, *shape)
        else:
            made = f"single-lora-embedding-{part}" if kind == "embedding" and part != "bias" else f"single-lora-{part}"
        item = Resident(0, made, shape, ir.DataType.FLOAT, path=path, retained=self.options.retained)
        if item.input not in self.inputs:
            value = ir.val(item.input, shape=ir.Shape(shape), dtype=item.dtype)
            self.module.graph.inputs.append(value)
            self.inputs[item.input] = value
            self.module.residents.append(item)
        return self.inputs[item.input]

    def _product(self, layer: Layer, factor: ir.Value, b: OpBuilder) -> ir.Value:
        """``x A``: ``[batch, seq, rank]``, or without slots of the rank that ``x`` has."""
        x = layer.node.inputs[0]
        if self._is_flat(layer):
            rows = b("Shape", self.module.port(POSITIONS), start=0, end=1)
            x = b("Reshape", x, b("Concat", rows, b.const([-1, layer.features[0]]), axis=0))
        return b("MatMul", x, self._of_row(factor, layer, b))

    def _looked_up(self, layer: Layer, factor: ir.Value, b: OpBuilder) -> ir.Value:
        """The column of ``A`` for each token: ``[batch, seq, rank]``."""
        tokens = layer.node.inputs[1]
        assert tokens is not None
        if not self.slots:
            return b("Transpose", b("Gather", factor, tokens, axis=1), perm=[1, 2, 0])
        slot = b("Expand", b("Unsqueeze", self.rows, b.const([1])), b("Shape", tokens))
        index = b("Concat", b("Unsqueeze", slot, b.const([2])), b("Unsqueeze", tokens, b.const([2])), axis=2)
        return b("GatherND", factor, index)

    def _of_row(self, factor: ir.Value, layer: Layer, b: OpBuilder) -> ir.Value:
        """The factor of each row, ``[batch, ..., in, out]``; without slots ``[in, out]``."""
        if not self.slots:
            return b("Transpose", factor, perm=[1, 0])
        rows = b("Gather", factor, self.rows, axis=0)
        between = list(range(1, _rank(layer.node) - 2))  # axes between rows and tokens, such as heads
        return b("Unsqueeze", rows, b.const(between)) if between else rows

    def _plus(self, last: ir.Node, delta: ir.Value, b: OpBuilder) -> ir.Value:
        """What a node returns and `delta`: a `Sum`, which no runtime fuses, so the base model's numbers stay."""
        old = last.outputs[0]
        return b("Sum", self._again(last, b), delta, shape=old.shape)

    def _plus_bias(self, total: ir.Value, last: ir.Node, bias: ir.Value, b: OpBuilder, *, flat: bool) -> ir.Value:
        old = last.outputs[0]
        if self.slots:
            assert bias.shape is not None
            width = int(bias.shape.numpy()[-1])
            between = list(range(1, max(_rank(last), 3) - 1))
            bias = b("Unsqueeze", b("Gather", bias, self.rows, axis=0), b.const(between))
            if flat:  # as many tokens of each row as there are in a run
                tokens = b("Shape", self.module.port(POSITIONS))
                full = b("Concat", tokens, b.const([width]), axis=0)
                bias = b("Reshape", b("Expand", bias, full), b.const([-1, width]))
        return b("Sum", total, bias, shape=old.shape)

    def _again(self, node: ir.Node, b: OpBuilder) -> ir.Value:
        """What a node returns, without the users it has."""
        attributes = {a.name: a.value for a in node.attributes.values()}
        old = node.outputs[0]
        return b(node.op_type, *node.inputs, domain=node.domain, shape=old.shape, dtype=old.dtype, **attributes)

    def _is_flat(self, layer: Layer) -> bool:
        """Whether rows and tokens are one axis, so that a row's slot has to be found again."""
        return self.slots and layer.kind != "embedding" and _rank(layer.node) == 2


def _rank(node: ir.Node) -> int:
    shape = node.outputs[0].shape
    if shape is None:
        raise PassError(f"the result of {node.op_type} '{node.outputs[0].name}' has no shape: put lora after unflatten")
    return len(shape)
