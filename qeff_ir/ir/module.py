"""`Module`: an ONNX model plus the typed facts that ONNX has no place for.

A module is an `onnx_ir.Model` (always valid ONNX), what a device keeps between runs, the symbolic dims of its
interface, the roles of its inputs and outputs, and the specializations it will be compiled for. The facts travel inside
the model's metadata, so that saving and loading is exact and every snapshot opens in any ONNX tool.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import numpy as np
import onnx_ir as ir

from qeff_ir.errors import ModelLoadError, PassError, PipelineError, VerificationError
from qeff_ir.ir import facts, ports
from qeff_ir.ir.ports import ROLES, Role
from qeff_ir.ir.residents import KINDS, DimValue, Resident
from qeff_ir.reading import parse_json, plain_name

FORMAT_VERSION = 5
"""Version of the facts below; a module of another version is refused."""

METADATA_KEY = "qeff.module"
SOURCE_KEY = "qeff.source"
"""Node metadata: path of the Hugging Face module that a node came from, for example ``model.layers.0.self_attn``.
`qeff_ir.ir.sources` reads it, for a node may stand for several."""
PASS_KEY = "qeff.pass"
"""Node metadata: the pass instance that created a node; absent on nodes that the frontend made."""

WEIGHT_KEY = "qeff.weight"
"""Initializer metadata: the parameter's name in the Hugging Face model; absent on constants. On the graph input for
token embeddings that the host looks up: the name of the table."""

CHANGED_KEY = "qeff.changed"
"""Initializer metadata: set when a pass has changed the numbers, which are then no longer the checkpoint's."""

PARTS_KEY = "qeff.parts"
"""Initializer metadata of a weight that a pass derived: the parameters it is computed from, separated by commas."""

LAYER_KEY = "qeff.layer"
"""Initializer metadata of a matrix: ``linear`` or ``embedding`` when it is the weight of such a layer, ``parameter``
when another kind of module multiplies by it (a router, say)."""


@dataclass(frozen=True, slots=True)
class Dim:
    """A symbolic dimension of the interface.

    Attributes:
        name: Symbol, as it stands in shapes and in specializations.
        maximum: Largest value the model can take (the length of a learned position table, say); `None` for no bound.
    """

    name: str
    maximum: int | None = None


RunPhase = Literal["prefill", "decode", "forward"]
"""Phases of a request in which a specialization runs: a chunk of the prompt, the tokens after it, or all of an input
that a model without a cache takes at once."""


@dataclass(frozen=True, slots=True)
class Specialization:
    """One set of static shapes that a module is compiled for.

    Attributes:
        name: Unique in a module; it tells nothing.
        phase: In which it runs, whatever the sizes are.
        symbols: A value for every symbolic dim of the interface.
    """

    name: str
    phase: RunPhase
    symbols: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class OutputSizes:
    """The sizes of an output of a model without a cache.

    Attributes:
        name: Of the output.
        sizes: Numbers, and expressions of the symbols of the inputs (see `qeff_ir.runtime.sizes`).
    """

    name: str
    sizes: tuple[DimValue, ...]


@dataclass(frozen=True, slots=True)
class Padding:
    """What padding on the right does to a model without a cache, on a target of fixed lengths.

    Attributes:
        fill: The token that fills rows of ``input_ids``.
        outputs: Those of which padding changes nothing, with the sizes that they have for the inputs alone. Any other
            output is right for inputs of just the compiled lengths.
        one_row: Whether the model takes one row at a time only: without a padding token, some read the last column.
    """

    fill: int = 0
    outputs: tuple[OutputSizes, ...] = ()
    one_row: bool = False

    def sizes(self, name: str) -> tuple[DimValue, ...] | None:
        """The sizes of one of these outputs; `None` when it is none of them."""
        return next((output.sizes for output in self.outputs if output.name == name), None)


@dataclass(frozen=True, slots=True)
class Facts:
    """What the metadata of a model say: a `Module` without its graph.

    Attributes:
        version: Format version.
        name: As in `Module`, a plain name; so are the others.
        residents: See `Module`.
        dims: See `Module`.
        specializations: See `Module`.
        properties: See `Module`.
        padding: See `Module`.
        ports: See `Module`.
    """

    version: int
    name: str
    residents: tuple[Resident, ...]
    dims: tuple[Dim, ...]
    specializations: tuple[Specialization, ...]
    properties: tuple[str, ...]
    padding: Padding | None = None
    ports: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass
class Module:
    """A model on its way from Hugging Face to a target.

    Attributes:
        model: The graph. Any snapshot of it is valid ONNX, the `qeff` dialect being ONNX functions.
        name: Name of the model class, used for file names.
        residents: What stays on the device between runs, in the order of `Resident.order`.
        dims: Symbolic dims of the interface by name.
        specializations: Static shapes to compile for; empty until a target is chosen.
        properties: Names of the properties that passes have established so far.
        padding: Of a model without a cache: what padding does to it, where it is known.
        ports: Roles of the graph inputs and outputs, by name (`qeff_ir.ir.ports.ROLES`); by default those that
            transformers' names tell.
    """

    model: ir.Model
    name: str
    residents: list[Resident] = field(default_factory=list[Resident])
    dims: dict[str, Dim] = field(default_factory=dict[str, Dim])
    specializations: list[Specialization] = field(default_factory=list[Specialization])
    properties: set[str] = field(default_factory=set[str])
    padding: Padding | None = None
    ports: dict[str, str] = field(default_factory=dict[str, str])

    def __post_init__(self) -> None:
        self.ports = self.ports or ports.known(self.graph)

    @property
    def graph(self) -> ir.Graph:
        """The main graph."""
        return self.model.graph

    @property
    def states(self) -> tuple[Resident, ...]:
        """The residents that are no adapters: what a request leaves for its next run, or has from its encoder."""
        return tuple(resident for resident in self.residents if resident.part is None)

    @property
    def adapters(self) -> tuple[Resident, ...]:
        """The residents that are parts of low-rank adapters."""
        return tuple(resident for resident in self.residents if resident.part is not None)

    def input(self, name: str) -> ir.Value:
        """The graph input of that name.

        Raises:
            VerificationError: There is none (code ``interface``).
        """
        return self._named(self.graph.inputs, "input", name)

    def output(self, name: str) -> ir.Value:
        """The graph output of that name.

        Raises:
            VerificationError: There is none (code ``interface``).
        """
        return self._named(self.graph.outputs, "output", name)

    def _named(self, values: Iterable[ir.Value], what: str, name: str) -> ir.Value:
        found = next((value for value in values if value.name == name), None)
        if found is None:
            raise VerificationError("interface", f"the graph of {self.name} has no {what} named '{name}'")
        return found

    def port(self, role: Role) -> ir.Value:
        """The graph input or output of a role.

        Raises:
            VerificationError: There is none (code ``interface``).
        """
        found = self.find(role)
        if found is None:
            raise VerificationError("interface", f"the graph of {self.name} has no port with the role '{role.name}'")
        return found

    def find(self, role: Role) -> ir.Value | None:
        """The graph input or output of a role; `None` when there is none."""
        values = self.graph.outputs if role.is_output else self.graph.inputs
        return next((v for v in values if self.role_of(v) is role), None)

    def role_of(self, value: ir.Value) -> Role | None:
        """The role of a graph input or output; `None` where it has none that is known here."""
        return ROLES.get(self.ports.get(str(value.name), ""))

    def declare(self, value: ir.Value, role: Role) -> ir.Value:
        """Give a named value, which is to be a graph input or output, its role; returns the value.

        Raises:
            PipelineError: The value has no name yet, or the role is not known (see `qeff_ir.ir.ports.define`).
        """
        if value.name is None or ROLES.get(role.name) is not role:
            what = "the value has no name" if value.name is None else f"there is no role '{role.name}'"
            raise PipelineError(f"a port cannot be declared ({what}): name the value, and define the role, before that")
        self.ports[value.name] = role.name
        return value

    def add_input(self, value: ir.Value, role: Role) -> ir.Value:
        """Make a named value an input of a run, with its role; returns the value.

        It stands behind the states, in the order that roles have (`qeff_ir.ir.ports.ROLES`), and before adapters.

        Raises:
            PipelineError: See `declare`.
        """
        order, inputs = list(ROLES), self.graph.inputs
        retained = {state.input for state in self.states if not state.last}
        at = max((index + 1 for index, other in enumerate(inputs) if other.name in retained), default=len(inputs))
        while at < len(inputs) and order.index(self.ports.get(str(inputs[at].name), order[-1])) < order.index(
            role.name
        ):
            at += 1
        inputs.insert(at, self.declare(value, role))
        return value

    def clone(self) -> Module:
        """A copy whose graph can be changed freely; tensors are shared, never copied, and made read-only for it."""
        model = self.model.clone()
        for graph in (model.graph, *(f.graph for f in model.functions.values())):
            for value in all_values(graph):
                value.type = _copied(value.type)  # onnx_ir shares it, and changes it in place
                if isinstance(value.const_value, ir.Tensor) and isinstance(value.const_value.raw, np.ndarray):
                    value.const_value.raw.flags.writeable = False
        copied = Module(
            model,
            self.name,
            list(self.residents),
            dict(self.dims),
            [dataclasses.replace(s, symbols=dict(s.symbols)) for s in self.specializations],
            set(self.properties),
            self.padding,
        )
        copied.ports = dict(self.ports)  # also when there are none: names tell nothing of a copy
        return copied

    def rename_dim(self, old: str, new: str) -> None:
        """Rename a symbol in every shape, resident, dim and specialization; two symbols may become one."""
        rename_symbols(self.graph, {old: new})
        self.residents = [
            dataclasses.replace(r, shape=tuple(new if d == old else d for d in r.shape)) for r in self.residents
        ]
        if old in self.dims:
            dim = self.dims.pop(old)
            self.dims.setdefault(new, dataclasses.replace(dim, name=new))
        self.specializations = [
            dataclasses.replace(s, symbols={new if k == old else k: v for k, v in s.symbols.items()})
            for s in self.specializations
        ]

    def set_size(self, symbol: str, size: int | Callable[[Specialization], int]) -> None:
        """Give a symbol a size in every specialization, or the size that a function tells for each.

        Raises:
            PassError: The symbol is not in `dims`.
        """
        self._check_symbol(symbol)
        self.specializations = [
            dataclasses.replace(s, symbols={**s.symbols, symbol: size if isinstance(size, int) else size(s)})
            for s in self.specializations
        ]

    def split(self, symbol: str, sizes: Mapping[RunPhase, Sequence[int]]) -> None:
        """Replace each specialization of a phase by one for each size that the symbol is to have in that phase.

        ``Prefill`` becomes ``Prefill_16`` and ``Prefill_32``; with one size it keeps its name. Sizes of a phase that
        the module has no specialization of make none.

        Raises:
            PassError: There are no sizes for a phase of the module, or one is less than 1 or is given twice; or the
                symbol is not in `dims`.
        """
        self._check_symbol(symbol)
        split: list[Specialization] = []
        for item in self.specializations:
            wanted = sizes.get(item.phase, ())
            if not wanted or min(wanted) < 1 or max(Counter(wanted).values()) > 1:
                raise PassError(
                    f"'{symbol}' is given the sizes {list(wanted)} in the phase '{item.phase}': give one or several, "
                    "all different and at least 1"
                )
            names = [item.name if len(wanted) == 1 else f"{item.name}_{size}" for size in wanted]
            split += [
                Specialization(name, item.phase, {**item.symbols, symbol: size})
                for name, size in zip(names, wanted, strict=True)
            ]
        self.specializations = split

    def _check_symbol(self, symbol: str) -> None:
        if symbol not in self.dims:
            known = ", ".join(self.dims)
            raise PassError(
                f"{self.name} has no symbol '{symbol}' that could have a size: it has {known}; add it to dims before"
            )

    def facts(self) -> dict[str, Any]:
        """The facts as plain JSON data (see `read_facts` for the way back)."""
        names = {value.name for value in (*self.graph.inputs, *self.graph.outputs)}
        found = Facts(
            FORMAT_VERSION,
            self.name,
            tuple(self.residents),
            tuple(self.dims.values()),
            tuple(self.specializations),
            tuple(sorted(self.properties)),
            self.padding,
            {name: role for name, role in sorted(self.ports.items()) if name in names},
        )
        return facts.dump(found)

    def write_facts(self) -> None:
        """Put the facts into the model's metadata, where saving keeps them."""
        self.model.metadata_props[METADATA_KEY] = json.dumps(self.facts(), sort_keys=True)

    @classmethod
    def with_facts(cls, model: ir.Model) -> Module:
        """The module that a model with facts in its metadata describes.

        Raises:
            VerificationError: The model carries no facts, those of another version, or damaged ones (code ``facts``).
        """
        text = model.metadata_props.get(METADATA_KEY)
        if text is None:
            raise VerificationError(
                "facts", f"the ONNX model has no '{METADATA_KEY}' metadata: it was not saved by qeff-ir"
            )
        found = read_facts(text)
        module = cls(
            model,
            found.name,
            list(found.residents),
            {d.name: d for d in found.dims},
            list(found.specializations),
            set(found.properties),
            found.padding,
        )
        module.ports = dict(found.ports)
        return module


def read_facts(text: str) -> Facts:
    """The facts in a model's metadata.

    Raises:
        VerificationError: They are of another version, or damaged (code ``facts``).
    """
    try:
        data: object = parse_json(text, "their text")
        version = cast("dict[str, object]", data).get("version") if isinstance(data, dict) else None
        if type(version) is int and version != FORMAT_VERSION:
            raise VerificationError(
                "facts",
                f"the module has format version {version}, this qeff-ir reads {FORMAT_VERSION}: lower the model again",
            )
        found = facts.read(Facts, data, "the module")
        plain_name(found.name, "the name of the module")
    except ModelLoadError as error:
        raise facts.damaged(str(error)) from error
    strange = next((r.kind for r in found.residents if r.kind not in KINDS), None)
    if strange is not None:
        raise facts.damaged(f"there is no kind of resident '{strange}': there are {', '.join(KINDS)}")
    names = {"dims": [d.name for d in found.dims], "residents": [r.input for r in found.residents]}
    twice = next((what for what, known in names.items() if len(set(known)) < len(known)), None)
    if twice is not None:
        raise facts.damaged(f"two {twice} have one name")
    for resident in found.residents:
        open_sizes = resident.part is not None and any(isinstance(size, str) for size in resident.shape)
        if open_sizes or len(resident.shape) <= (KINDS[resident.kind].context_axis or 0):
            raise facts.damaged(f"the resident {resident.input} has the shape {list(resident.shape)}")
        if (resident.path is None) != (resident.part is None) or not (resident.retained or resident.part):
            raise facts.damaged(f"the resident {resident.input} is of the kind '{resident.kind}'")
    return found


def _copied(type_: ir.TypeProtocol | None) -> ir.TypeProtocol | None:
    if isinstance(type_, ir.TensorType):
        return ir.TensorType(type_.dtype, denotation=type_.denotation)
    return copy.deepcopy(type_)


def all_values(graph: ir.Graph) -> Iterable[ir.Value]:
    """Every value of a graph and of the subgraphs of its nodes: inputs, initializers, node outputs."""
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in ir.traversal.RecursiveGraphIterator(graph):
        yield from node.outputs


def rename_symbols(graph: ir.Graph, renames: Mapping[str, str]) -> None:
    """Rename symbols inside the shapes of all values of a graph, in expressions such as ``2*seq_len`` too."""
    if not renames:
        return
    pattern = re.compile(r"\b(" + "|".join(re.escape(name) for name in renames) + r")\b")
    for value in all_values(graph):
        if value.shape is not None and not value.shape.is_static():
            value.shape = ir.Shape(
                [
                    ir.SymbolicDim(pattern.sub(lambda m: renames[m.group(1)], d.value))
                    if isinstance(d, ir.SymbolicDim) and d.value is not None
                    else d
                    for d in value.shape.dims
                ]
            )
