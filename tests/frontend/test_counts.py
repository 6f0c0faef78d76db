"""What a model computes from a count of positions is right for the positions that are given, or the model is refused.

Each kind of counting is a function of what models of the kind have at hand. What is right is told by the function
itself, run as transformers runs it: a row alone, without padding, from its first token to its last.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from backends import find_backend
from backends.options import CompileOptions
from qeff_ir.compiler import compile_model
from qeff_ir.errors import UnsupportedModelError
from qeff_ir.frontend.capture import ops
from qeff_ir.frontend.export.positions import give_positions
from qeff_ir.frontend.providers.memory import Memory
from qeff_ir.frontend.source import Source
from qeff_ir.numerics import error_over_rms
from qeff_ir.runtime.decoder import Decoder
from qeff_ir.testing.trace import reference_trace
from tests.frontend.test_positions import Run

Tensor = torch.Tensor
WIDTH, LONGEST, SLOTS, VOCAB = 4, 16, 9, 50
_ = ops.TRANSLATIONS  # defines torch.ops.qeff

Kind = Callable[[Any], Tensor]


class Model(torch.nn.Module):
    """One computation with counts: on hidden states ``[batch, seq, width]``, or on scores ``[batch, 1, seq, slots]``.

    Scores end as weights, which are 0 where a slot is later than the token.
    """

    embeddings: Tensor

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.kind = kind
        self.register_buffer("embeddings", torch.rand((VOCAB, WIDTH), generator=generator))
        self.register_buffer("table", torch.rand((LONGEST, WIDTH), generator=generator))
        self.register_buffer("biases", torch.rand((2 * LONGEST + 1, 1), generator=generator))
        self.register_buffer("ids", torch.arange(LONGEST)[None])

    def compute(self, ids: Tensor, positions: Tensor, keys: Tensor, past: int, slots: Tensor) -> Tensor:
        hidden = self.embeddings[ids]
        scores = (hidden @ keys[:, 0].transpose(1, 2))[:, None]
        rows, run = ids.shape
        given = {"x": hidden, "scores": scores, "batch": rows, "run": run, "past": past, "slots": keys.shape[2]}
        given |= {"key_positions": slots[:, None, :]}
        out = self.kind(SimpleNamespace(**given, positions=positions, tokens=ids, **dict(self.named_buffers())))
        return (
            out.masked_fill((slots[:, None, :] > positions[:, :, None])[:, None], -1e4).softmax(-1)
            if out.dim() == 4
            else out
        )

    def forward(self, input_ids: Tensor, position_ids: Tensor, past: Tensor, counted: Tensor) -> Tensor:
        slots = torch.ops.qeff.cache_positions(past, position_ids)
        return self.compute(input_ids, position_ids, past, counted.shape[0], slots)


def lowered(kind: Kind) -> tuple[Model, torch.fx.GraphModule, int, int | None]:
    """The model, its graph after positions were given, how many nodes that changed, and the longest context."""
    dynamic = torch.export.Dim.DYNAMIC
    ids = {0: dynamic, 1: dynamic}
    module = Model(kind)
    program = torch.export.export(
        module,
        (*torch.zeros(2, 2, 5, dtype=torch.long), torch.zeros(2, 1, 11, WIDTH), torch.zeros(6)),
        dynamic_shapes=(ids, ids, {0: dynamic, 2: dynamic}, {0: dynamic}),
        strict=False,
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    changed, limit = give_positions(program, "input_ids", "position_ids", "counted", "Tested")
    program.graph_module.graph.lint()
    program.graph_module.recompile()
    return module, program.graph_module, changed, limit


RIGHT: dict[str, Kind] = {
    "temperature": lambda m: (
        m.x
        * (torch.log1p(torch.floor((torch.arange(m.run) + m.past + 1.0) / 3)) * 0.5 + 1)
        .view(1, m.run, 1)
        .expand(m.batch, m.run, 1)
    ),
    "clamped": lambda m: (
        m.x + torch.nn.functional.embedding(torch.arange(m.past, m.past + m.run).clamp(max=5), m.table)
    ),
    "wrapped": lambda m: m.x + m.table[torch.arange(m.past, m.past + m.run) % 4],
    "divided": lambda m: m.x * ((torch.arange(m.run) + m.past) // 2)[:, None],
    "sinusoid": lambda m: (
        m.x
        * torch.cat([(a := torch.arange(m.past, m.past + m.run).float()[:, None] * m.table[0, :2]).sin(), a.cos()], -1)
    ),
    "outer product": lambda m: m.x * torch.outer(torch.arange(m.past, m.past + m.run).float(), m.table[1])[None],
    "summed mask": lambda m: (
        m.x * torch.ones(m.batch, m.past + m.run).long().cumsum(-1)[:, m.past :].unsqueeze(-1).float().log1p()
    ),
    "summed mask from its end": lambda m: (
        m.x + m.table[torch.ones(m.batch, m.past + m.run).long().cumsum(-1)[:, -m.run :]]
    ),
    "tokens that are no padding": lambda m: m.x * ((m.tokens != 1).long().cumsum(1) + m.past).unsqueeze(-1),
    "fairseq": lambda m: m.x + m.table[((mask := (m.tokens != 1).int()).cumsum(1).type_as(mask) + m.past) * mask + 1],
    "from the slots": lambda m: m.x * torch.arange(m.slots - m.run, m.slots)[None, :, None].float().sqrt(),
    "run alone": lambda m: m.x * (torch.arange(m.run)[:, None] + 1.0),
    "piece of a table": lambda m: m.x * m.table[m.past : m.past + m.run],
    "piece of stored positions": lambda m: m.x + m.table[m.ids[:, m.past : m.past + m.run]],
    "rows of a piece": lambda m: m.x * m.table[: m.slots][m.positions],
    "rows of a counted piece": lambda m: m.x * m.table[: m.past + m.run][m.positions],
    "branch by a count": lambda m: torch.where((torch.arange(m.run) + m.past < 3)[None, :, None], m.x, -m.x),
    "parity": lambda m: m.x * torch.pow(-1.0, torch.arange(m.past, m.past + m.run))[:, None],
    "heads in front": lambda m: (
        (
            m.x.view(m.batch, m.run, 2, 2).transpose(1, 2)
            * (torch.arange(m.run) + m.past + 1)[None, None, :, None].float().log1p()
        )
        .transpose(1, 2)
        .reshape(m.batch, m.run, WIDTH)
    ),
    "slope of keys": lambda m: m.scores + 0.3 * torch.arange(m.slots)[None, None, None],
    "slope of keys, rows and heads on one axis": lambda m: (
        (
            m.scores.expand(-1, 2, -1, -1).reshape(m.batch * 2, m.run, m.slots)
            + (m.table[:2, :1] * torch.arange(m.slots))[None].expand(m.batch, -1, -1).reshape(-1, 1, m.slots)
        )
        .view(m.batch, 2, m.run, m.slots)
        .amax(1, keepdim=True)
    ),
    "slope of distances": lambda m: (
        m.scores - 0.3 * (torch.arange(m.past, m.past + m.run)[:, None] - torch.arange(m.slots)).abs()
    ),
    "slope from the last key": lambda m: (
        m.scores + (torch.arange(1 - LONGEST, 1) * 0.3)[None, None, None][..., -m.slots :]
    ),
    "biases by distance": lambda m: (
        m.scores
        + m.biases[
            (torch.arange(m.slots)[None] - torch.arange(m.slots - m.run, m.slots)[:, None]).clamp(-3, 3) + LONGEST
        ].permute(2, 0, 1)[None]
    ),
    "slots that a mask leaves": lambda m: (
        m.scores / (m.key_positions <= m.positions[:, :, None]).sum(-1)[:, None, :, None]
    ),
    "stored mask": lambda m: m.scores.masked_fill(
        ~torch.ones(LONGEST, LONGEST, dtype=torch.bool).tril()[m.slots - m.run : m.slots, : m.slots], -1e4
    ),
}

LAST = (3, 7, 3)
POSITIONS = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7], [2, 3, -1, -1]])
"""A first chunk, a later one, and one that ends in padding."""


def results(kind: Kind) -> tuple[Tensor, list[Tensor]]:
    """What the graph gives for `POSITIONS`, and what the model gives for each row alone, from its first token on."""
    module, graph, _, _ = lowered(kind)
    whole = torch.randint(3, VOCAB, (3, SLOTS), generator=torch.Generator().manual_seed(1))
    tokens = whole.gather(1, POSITIONS.clamp(min=0))
    embeddings: Any = module.embeddings
    keys = embeddings[whole][:, None]
    buffers = {f"b_{name}": buffer for name, buffer in module.named_buffers()}
    inputs = {"input_ids": tokens, "position_ids": POSITIONS, "past": keys, "counted": torch.zeros(2)}
    names = [node.name for node in graph.graph.nodes if node.op == "placeholder"]
    (found,) = Run(graph).run(*({**buffers, **inputs}[name] for name in names))
    alone = [
        module.compute(
            whole[row : row + 1, : last + 1],
            torch.arange(last + 1)[None],
            keys[row : row + 1, :, : last + 1],
            0,
            torch.arange(last + 1)[None],
        )
        for row, last in enumerate(LAST)
    ]
    return found, alone


@pytest.mark.parametrize("name", RIGHT)
def test_a_count_is_that_of_the_given_positions(name: str) -> None:
    found, alone = results(RIGHT[name])
    for row, expected in enumerate(alone):
        real = POSITIONS[row] >= 0
        at = POSITIONS[row][real]
        if expected.dim() == 4:
            columns = expected.shape[-1]
            assert torch.allclose(found[row, 0, real][:, :columns], expected[0, 0, at], atol=1e-6)
        else:
            assert torch.allclose(found[row, real], expected[0, at], atol=1e-6)


REFUSED: dict[str, Kind] = {
    "length of the run": lambda m: m.x * m.run,
    "length of the cache": lambda m: m.x / m.slots,
    "tokens so far": lambda m: m.x * (m.past + m.run),
    "tokens so far, above a floor": lambda m: m.x * torch.log(torch.full((1,), m.past + m.run).clamp(min=8192).float()),
    "summed ones": lambda m: m.x * torch.ones(m.run).sum(),
    "summed mask": lambda m: m.x / (m.tokens != 1).sum(1)[:, None, None],
    "own triangle": lambda m: m.scores.masked_fill(
        ~torch.ones(m.run, m.slots, dtype=torch.bool).tril(m.slots - m.run), -1e4
    ),
    "distance to the end": lambda m: m.x * (m.run - torch.arange(m.run))[:, None],
    "share of the run": lambda m: m.x * (torch.arange(m.run) / m.run)[:, None],
    "longest position": lambda m: m.x * m.positions.max(),
    "weights by distance to the end": lambda m: m.scores * (m.slots - torch.arange(m.slots)),
    "written in place": lambda m: m.x + torch.zeros(1, 1, WIDTH).fill_(m.slots),
    "written into a piece": lambda m: _write(torch.zeros(1, 1, WIDTH), m.slots) + m.x,
    "length as a row": lambda m: m.x + m.table[torch.full((1,), m.past + m.run) % LONGEST],
}


def _write(target: Tensor, number: int) -> Tensor:
    target[..., 0] += number
    return target


@pytest.mark.parametrize("name", REFUSED)
def test_what_depends_on_the_cut_is_refused(name: str) -> None:
    with pytest.raises(
        UnsupportedModelError,
        match=r"^Tested (counts positions in the model itself: .* position_ids$|builds attention masks by itself, so)",
    ):
        lowered(REFUSED[name])


LEFT_ALONE: dict[str, Kind] = {
    "windows of tokens": lambda m: (
        torch.nn.functional.pad(m.x.transpose(1, 2), (3, 0))[..., -(m.run + 3) :]
        .unfold(-1, 4, 1)
        .sum(-1)
        .transpose(1, 2)
    ),
    "rows of the run": lambda m: m.x[:, torch.arange(m.run)],
    "rows of all tokens": lambda m: m.x.reshape(-1, WIDTH)[torch.arange(m.batch * m.run)].view(m.batch, m.run, WIDTH),
    "triangle of the run": lambda m: (torch.arange(m.run)[:, None] >= torch.arange(m.run)).float() @ m.x,
    "zeros of the run's length": lambda m: m.x + torch.zeros(LONGEST)[: m.run].expand(m.batch, -1).unsqueeze(-1),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_sizes_that_change_no_number_stay(name: str) -> None:
    assert lowered(LEFT_ALONE[name])[2] == 0


LIMITS: dict[str, tuple[Kind, int]] = {
    "long runs": (lambda m: m.x if m.run <= 8 else -m.x, 8),
    "long contexts": (lambda m: m.x if m.past + m.run <= 12 else m.x / 2, 12),
    "long caches": (lambda m: m.x if m.slots < 33 else m.x / 2, 32),
    "long past": (lambda m: m.x if m.past <= 20 else m.x / 2, 21),
    "longest position": (lambda m: torch.where(m.positions.max() + 1 > 14, m.x / 2, m.x), 14),
}


@pytest.mark.parametrize("name", LIMITS)
def test_a_branch_on_the_length_bounds_the_context(name: str) -> None:
    kind, limit = LIMITS[name]
    assert lowered(kind)[3] == limit


def test_a_branch_that_one_token_takes_otherwise_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"^Tested counts positions: it does one .* \(s\d+ >= 4\)$"):
        lowered(lambda m: m.x if m.run >= 4 else -m.x)


@pytest.mark.parametrize("target", ["onnxruntime", "ai100"])
def test_a_temperature_that_grows_with_the_position(target: str, tmp_path: Path) -> None:
    """Layers without rotary scale by a count, past the positions where the scale changes; one row idles."""
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 32, "intermediate_size_mlp": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
    layers = {"num_hidden_layers": 2, "moe_layers": [], "no_rope_layers": [0, 1], "attention_chunk_size": 6}
    scale = {"attn_temperature_tuning": True, "floor_scale": 4, "attn_scale": 0.5, "initializer_range": 0.3}
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama4_text", **sizes, **heads, **layers, **scale, num_local_experts=2)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    source = Source(Memory(model))
    options = CompileOptions(prefill_seq_len=5, ctx_len=32, batch_size=3)
    folder = compile_model(source, options, target=target, emit_only=target == "ai100").folder
    decoder = Decoder(find_backend(target).open(folder, threads=1))
    prompts = [list(range(3, 20)), [7, 8, 9]]
    tokens = reference_trace(model, prompts, 8)
    found = [decoder.prefill([*prompts, []])] + [decoder.decode([*row, 0]) for row in tokens.tokens[:-1]]
    assert max(error_over_rms(a[:2], b) for a, b in zip(found, tokens.logits, strict=True)) < 1e-5
