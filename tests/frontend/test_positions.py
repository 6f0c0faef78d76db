"""What a model counts for itself is what the given positions say, row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qeff_ir.frontend.capture import ops
from qeff_ir.frontend.export.positions import give_positions

Tensor = torch.Tensor
ROWS, SEQ, SLOTS, LONGEST = 3, 4, 9, 16
_ = ops.TRANSLATIONS  # defines torch.ops.qeff


class Distances(torch.nn.Module):
    """``[batch, 1, seq, slots]``: how far each slot of a cache lies behind each token."""

    def forward(self, input_ids: Tensor, position_ids: Tensor, past: Tensor, counted: Tensor) -> Tensor:
        rows, columns = torch.arange(input_ids.shape[1]), torch.arange(past.shape[2])
        distance = (rows[:, None] - columns[None, :])[None, None]
        return distance.expand(input_ids.shape[0], 1, -1, -1) + 0


class Bias(torch.nn.Module):
    """``[batch, heads, seq, slots]``: a number by head and distance, nothing outside of a range.

    The table of distances has no axis of the batch, nor of the heads: both are put before it by broadcasting.
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.by_distance = torch.nn.Buffer(torch.randn(heads, SLOTS, generator=torch.Generator().manual_seed(1)))

    def forward(self, input_ids: Tensor, position_ids: Tensor, past: Tensor, counted: Tensor) -> Tensor:
        rows, columns = torch.arange(input_ids.shape[1]), torch.arange(past.shape[2])
        distance = rows[:, None] - columns[None, :]
        size = (input_ids.shape[0], self.by_distance.shape[0])
        stored = self.by_distance[None, :, None].expand(*size, input_ids.shape[1], -1)
        bias = torch.gather(stored, -1, distance.clamp(0, SLOTS - 1).expand(*size, -1, -1))
        return bias.masked_fill((distance < 0) | (distance >= 4), 0.0)


class Slopes(torch.nn.Module):
    """``[batch, heads, seq, slots]``: distances times a number of each head, which has no axis of the batch either."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.slopes = torch.nn.Buffer(torch.arange(1.0, heads + 1))

    def forward(self, input_ids: Tensor, position_ids: Tensor, past: Tensor, counted: Tensor) -> Tensor:
        rows, columns = torch.arange(input_ids.shape[1]), torch.arange(past.shape[2])
        distance = (rows[:, None] - columns[None, :]).to(torch.float32)
        bias = (self.slopes[:, None, None] * distance).unsqueeze(0)
        more = distance[None].abs()[None] * self.slopes[None, :, None, None]
        return (bias + more).expand(input_ids.shape[0], -1, -1, -1) * 2


class StoredMask(torch.nn.Module):
    """``[batch, 1, seq, slots]``: which slots a token sees, cut out of a table."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.ones(1, 1, LONGEST, LONGEST, dtype=torch.bool).tril())

    def forward(self, input_ids: Tensor, position_ids: Tensor, past: Tensor, counted: Tensor) -> Tensor:
        slots, run = past.shape[2], input_ids.shape[1]
        seen: Any = self.table
        return torch.where(seen[:, :, slots - run : slots, :slots], torch.ones(input_ids.shape[0], 1, 1, 1), 0.0)


class Rows(torch.nn.Module):
    """``[batch, 1, seq, width]``: the rows of a table, on axes that are put before them."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(2.0 * LONGEST).reshape(LONGEST, 2))

    def forward(self, input_ids: Tensor, position_ids: Tensor, past: Tensor, counted: Tensor) -> Tensor:
        found = torch.nn.functional.embedding(torch.arange(input_ids.shape[1]), self.table)[None, None]
        first, second = found.chunk(2, dim=-1)
        return torch.stack([second, first], dim=-1).reshape_as(found) + torch.zeros(input_ids.shape[0], 1, 1, 1)


class Counted(torch.nn.Module):
    """``[batch, seq, width]``: rows of a table by a count, on as many rows as the positions have."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(2.0 * LONGEST).reshape(LONGEST, 2))

    def forward(self, input_ids: Tensor, position_ids: Tensor, past: Tensor, counted: Tensor) -> Tensor:
        count = torch.arange(input_ids.shape[1]).expand(position_ids.shape[0], -1) + 2
        return torch.nn.functional.embedding(count, self.table) + 0 * position_ids[:, :, None]


class Stored(torch.nn.Module):
    """``[batch, seq, width]``: rows of a table by positions that are stored on one row."""

    stored: Tensor
    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("stored", torch.arange(LONGEST)[None])
        self.register_buffer("table", torch.arange(2.0 * LONGEST).reshape(LONGEST, 2))

    def forward(self, input_ids: Tensor, position_ids: Tensor, past: Tensor, counted: Tensor) -> Tensor:
        start = counted.shape[0]
        found = torch.nn.functional.embedding(self.stored[:, start : start + input_ids.shape[1]], self.table)
        return found + 0 * input_ids[:, :, None]


class Kinds(torch.nn.Module):
    """``[batch, seq]``: the kind of each token, looked up by positions."""

    def __init__(self, from_tokens: bool, gathered: bool) -> None:
        super().__init__()
        self.from_tokens, self.gathered = from_tokens, gathered

    def forward(self, input_ids: Tensor, position_ids: Tensor, past: Tensor, counted: Tensor) -> Tensor:
        kinds = (input_ids == 90).long() if self.from_tokens else torch.zeros_like(input_ids)
        if self.gathered:
            return torch.gather(kinds, 1, position_ids)
        return kinds[torch.arange(input_ids.shape[0])[:, None], position_ids]


class Run(torch.fx.Interpreter):
    """Runs a changed graph; slot ``p`` of a cache holds position ``p``."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch.ops.qeff.cache_positions.default:
            past, positions = args
            return torch.arange(past.shape[2]).expand(positions.shape[0], -1)
        if target is torch.ops.aten.embedding.default:  # padding takes some row, as in ONNX
            return args[0][args[1]]
        return super().call_function(target, args, kwargs)


def given(module: torch.nn.Module, positions: Tensor, tokens: Tensor) -> tuple[int, Tensor, torch.fx.Graph]:
    """How many nodes were changed, the result for these positions, and the graph."""
    dynamic = torch.export.Dim.DYNAMIC
    ids = {0: dynamic, 1: dynamic}
    program = torch.export.export(
        module,
        (
            torch.zeros(2, 5, dtype=torch.long),
            torch.zeros(2, 5, dtype=torch.long),
            torch.zeros(2, 1, 11, 1),
            torch.zeros(6),
        ),
        dynamic_shapes=(ids, ids, {0: dynamic, 2: dynamic}, {0: dynamic}),
        strict=False,
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    changed, _ = give_positions(program, "input_ids", "position_ids", "counted", "Tested")
    graph = program.graph_module
    graph.graph.lint()
    graph.recompile()
    inputs = (
        *(t for _, t in module.named_buffers()),
        tokens,
        positions,
        torch.zeros(ROWS, 1, SLOTS, 1),
        torch.zeros(2),
    )
    (result,) = Run(graph).run(*inputs)
    return changed, result, graph.graph


POSITIONS = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7], [2, 3, -1, -1]])
TOKENS = torch.randint(3, 50, (ROWS, SEQ), generator=torch.Generator().manual_seed(0))


def test_distances_are_those_of_the_positions() -> None:
    changed, result, _ = given(Distances(), POSITIONS, TOKENS)
    assert changed == 1
    assert torch.equal(result, (POSITIONS[:, :, None] - torch.arange(SLOTS))[:, None])


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_distances_meet_the_heads_behind_the_batch(heads: int) -> None:
    """Also where there are as many heads as rows in the example."""
    distance = POSITIONS[:, None, :, None] - torch.arange(SLOTS)
    module = Bias(heads)
    changed, result, _ = given(module, POSITIONS, TOKENS)
    found = module.by_distance[torch.arange(heads)[None, :, None, None], distance.clamp(0, SLOTS - 1)]
    assert changed == 1
    assert torch.equal(result, torch.where((distance < 0) | (distance >= 4), 0.0, found))
    changed, result, _ = given(Slopes(heads), POSITIONS, TOKENS)
    assert changed == 1
    expected = (distance + distance.abs()) * torch.arange(2.0, 2 * heads + 1, 2)[None, :, None, None]
    assert torch.equal(result, expected)


def test_a_stored_mask_is_looked_up_by_the_positions() -> None:
    changed, result, _ = given(StoredMask(), POSITIONS, TOKENS)
    assert changed == 1
    real = POSITIONS >= 0
    expected = torch.arange(SLOTS) <= POSITIONS[:, :, None]
    assert result.shape == (ROWS, 1, SEQ, SLOTS)
    assert torch.equal(result[:, 0][real] == 1.0, expected[real])


def test_rows_of_a_table_keep_their_batch_first() -> None:
    positions = POSITIONS.clamp(min=0)
    changed, result, _ = given(Rows(), positions, TOKENS)
    assert changed == 1
    assert torch.equal(result[:, 0], torch.stack([2.0 * positions + 1, 2.0 * positions], dim=-1))


def test_the_size_of_the_positions_is_not_the_positions() -> None:
    positions = POSITIONS.clamp(min=0)
    changed, result, _ = given(Counted(), positions, TOKENS)
    assert changed == 1
    assert torch.equal(result, torch.stack([2.0 * (positions + 2), 2.0 * (positions + 2) + 1], dim=-1))


def test_a_table_is_looked_up_by_positions_that_are_stored() -> None:
    changed, result, _ = given(Stored(), POSITIONS.clamp(min=0), TOKENS)
    assert changed == 1
    assert torch.equal(result, torch.arange(2.0 * LONGEST).reshape(LONGEST, 2)[POSITIONS.clamp(min=0)])


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("from_tokens", [False, True])
def test_only_what_no_token_changes_is_one_number(from_tokens: bool, gathered: bool) -> None:
    tokens = TOKENS.clone()
    tokens[1, 0] = 90
    positions = torch.arange(SEQ).expand(ROWS, -1)
    changed, result, graph = given(Kinds(from_tokens, gathered), positions, tokens)
    assert changed == 0
    lookups = (torch.ops.aten.index.Tensor, torch.ops.aten.gather.default)
    looked_up = any(node.target in lookups for node in graph.nodes)
    assert looked_up == from_tokens
    assert int(result.sum()) == int(from_tokens)
