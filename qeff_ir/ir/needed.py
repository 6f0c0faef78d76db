"""What a run of known sizes needs of a graph: a compiler of fixed sizes leaves out what these do not choose."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir


class Needed:
    """The nodes that lead to an output, past each choice (`Where`) that follows from sizes alone.

    Args:
        graph: A graph without calls of functions.
        shapes: Sizes of its values by name, as far as they are known.

    Attributes:
        nodes: The nodes, without those that hand on a value as it is.
    """

    def __init__(self, graph: ir.Graph, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = shapes
        self.nodes: set[ir.Node] = set()
        waiting = list(graph.outputs)
        while waiting:
            node = self.source(waiting.pop()).producer()
            if node is not None and node not in self.nodes:
                self.nodes.add(node)
                waiting.extend(value for value in node.inputs if value is not None)
        self._read = {self.source(one) for node in self.nodes for one in node.inputs if one is not None}

    def source(self, value: ir.Value) -> ir.Value:
        """The value that stands in the place of this one in the run."""
        while (node := value.producer()) is not None:
            taken = 0 if node.op_type == "Identity" else self._choice(node) if node.op_type == "Where" else None
            given = None if taken is None else node.inputs[taken]
            if given is None:
                break
            value = given
        return value

    def reads(self, value: ir.Value) -> bool:
        """Whether something is made of a value in the run."""
        return value in self._read

    def _choice(self, node: ir.Node) -> int | None:
        """The number of the input that a `Where` takes for all elements; `None` where no size tells."""
        compared = node.inputs[0].producer() if node.inputs[0] is not None else None
        if compared is None or compared.op_type != "Equal":
            return None
        left, right = map(self._size, compared.inputs)
        return None if left is None or right is None else 1 if left == right else 2

    def _size(self, value: ir.Value | None) -> int | None:
        """A size, or a constant of one number; `None` of another value."""
        maker = value.producer() if value is not None else None
        if maker is not None and maker.op_type == "Shape" and maker.inputs[0] is not None:
            known = self._shapes.get(maker.inputs[0].name or "", ())
            end = maker.attributes.get("end")
            found = known[maker.attributes.get_int("start", 0) : None if end is None else end.as_int()]
            return found[0] if len(found) == 1 else None
        constant = ir.convenience.get_const_tensor(value) if value is not None else None
        return int(constant.numpy().item()) if constant is not None and constant.size == 1 else None
