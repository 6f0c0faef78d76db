"""The host looks up the tokens: the same numbers as in the graph, and the table only where something else needs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from qeff_ir import QEFFAutoModelForCausalLM
from qeff_ir.arrays import Array
from qeff_ir.compiler import TokenEmbedding
from qeff_ir.errors import PackageError, PassError, RuntimeInputError
from qeff_ir.frontend.source import Source, open_source
from qeff_ir.ir.module import CHANGED_KEY, WEIGHT_KEY, Module
from qeff_ir.package import MAIN
from qeff_ir.passing.base import Rewriter
from qeff_ir.ranges import stored
from qeff_ir.runtime.decoder import Decoder
from qeff_ir.runtime.token_table import TokenTable
from qeff_ir.testing.build import build as draw
from qeff_ir.testing.judge import prepare
from qeff_ir.testing.recipe import Layer, Recipe
from tests.models import VOCAB, build
from tests.properties import LONG
from tests.support import PROMPTS, Lowered, apply, canonical, generate, tiny

TIED = ["gemma2", "gpt2", "bloom"]
"""The first scales what is looked up, the second looks up positions too, the third asks for the shape of the tokens."""
UNTIED = ["llama", "gpt-oss"]


def compiled(source: Source, target: str, folder: Path, side: TokenEmbedding) -> QEFFAutoModelForCausalLM:
    model = QEFFAutoModelForCausalLM._opened(source)  # pyright: ignore[reportPrivateUsage]
    model.compile(
        target=target,
        token_embedding=side,
        emit_only=True,
        compile_dir=folder / f"{target}-{side}",
        prefill_seq_len=8,
        ctx_len=48,
        batch_size=2,
    )
    return model


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> QEFFAutoModelForCausalLM:
    return compiled(Lowered("llama"), "onnxruntime", tmp_path_factory.mktemp("host"), "host")


def logits(model: QEFFAutoModelForCausalLM) -> list[Array]:
    decoder = model.runner(threads=1).decoder
    return [decoder.prefill(PROMPTS), *(decoder.decode([5 + step, 9]) for step in range(3))]


def ranges(folder: Path) -> list[tuple[tuple[str, str], ...]]:
    """Where the initializers of the size of the table lie."""
    (file,) = folder.glob("*.onnx")
    found = onnx.load(str(file), load_external_data=False).graph.initializer
    tables = [t for t in found if sorted(t.dims) == [32, VOCAB]]
    return [tuple(sorted((e.key, e.value) for e in t.external_data)) for t in tables]


@pytest.mark.parametrize(
    ("name", "target"), [*((n, "onnxruntime") for n in [*TIED, *UNTIED]), ("gemma2", "ai100"), ("llama", "ai100")]
)
def test_the_numbers_are_those_of_the_graph(name: str, target: str, tmp_path: Path) -> None:
    """A table that is tied to the LM head is stored once, one that is not leaves with the look-up."""
    source = Lowered(name)
    graph, host = (compiled(source, target, tmp_path, side) for side in ("graph", "host"))
    assert "token-embedding" in host.package.manifest.programs[MAIN].report["pipeline"]
    for ours, theirs in zip(logits(host), logits(graph), strict=True):
        assert np.ptp(theirs) > 0
        np.testing.assert_array_equal(ours, theirs)
    inputs = host.runner().decoder.session.interface.inputs
    assert [(t.name, t.dtype) for t in inputs[:2]] == [("inputs_embeds", np.float32), ("position_ids", np.int64)]
    assert inputs[0].shape == ("batch_size", "seq_len", 32)
    assert not any(t.name == "input_ids" for t in inputs)
    assert len(ranges(host.package.folder)) == 1  # the LM head
    found = ranges(graph.package.folder)
    assert all(found) and len(set(found)) == len(found) == (1 if name in TIED else 2)
    total = sum(p.numel() for p in tiny(name)[1].parameters()) * 4  # a tied one counts once
    stored = sum(f.stat().st_size for f in (graph.package.folder / "weights").iterdir())
    assert 0.9 * total < stored < total + 32 * VOCAB * 4


@pytest.mark.parametrize("name", ["gemma2", "bloom"])
def test_a_tied_table_stays_the_weight_that_it_is(name: str) -> None:
    """The head still reads it: by its name it is a part of the checkpoint, not a constant."""
    module = canonical(name)
    table = look_up(module).inputs[0]
    assert table is not None and WEIGHT_KEY in table.metadata_props
    before = dict(table.metadata_props)
    apply(module, "token-embedding")
    assert table.consumers() and module.graph.initializers[table.name or ""] is table
    assert dict(table.metadata_props) == before


def test_transformers_generates_the_same(host: QEFFAutoModelForCausalLM) -> None:
    ids = torch.tensor([PROMPTS[0], PROMPTS[0][::-1]])
    kwargs: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    expected = generate(tiny("llama")[1], inputs=ids, attention_mask=torch.ones_like(ids), **kwargs)
    assert torch.equal(host.generate(ids, **kwargs), expected)


def test_another_row_is_another_token(host: QEFFAutoModelForCausalLM) -> None:
    """The comparison above tells when the host looks up the wrong rows."""
    first = logits(host)[0]
    model: Any = tiny("llama")[1]
    table = model.get_input_embeddings().weight.detach().numpy().copy()
    session = host.runner().decoder.session
    np.testing.assert_array_equal(Decoder(session, TokenTable(ir.tensor(table))).prefill(PROMPTS), first)
    table[PROMPTS[0][-1]] += 0.5
    assert not np.array_equal(Decoder(session, TokenTable(ir.tensor(table))).prefill(PROMPTS)[0], first[0])


def test_rows_of_a_narrow_checkpoint_are_mapped_not_loaded(tmp_path: Path) -> None:
    model: Any = build("llama")[1]
    model.to(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    weight = open_source(tmp_path).weights()["model.embed_tokens.weight"]
    ids = np.array([[5, 96, 5], [0, 1, 2]])
    rows = TokenTable(weight).vectors(ids)
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, model.get_input_embeddings().weight.detach().float().numpy()[ids])
    data = stored(weight)
    assert data.nbytes == 32 * VOCAB * 2
    while not isinstance(data, np.memmap):
        assert data.base is not None
        data = data.base


def test_a_package_alone_has_no_table(host: QEFFAutoModelForCausalLM) -> None:
    folder = host.package.folder
    with pytest.raises(
        PackageError, match=r"stay in the model's checkpoint: open the package with from_package\(…, ch"
    ):
        QEFFAutoModelForCausalLM.from_package(folder).runner()
    again = QEFFAutoModelForCausalLM.from_package(folder, checkpoint=Lowered("llama"))
    for ours, theirs in zip(logits(again), logits(host), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(
        PackageError, match=r"wants the table model\.embed_tokens\.weight of \[tokens, 32\], and the .* None"
    ):
        QEFFAutoModelForCausalLM.from_package(folder, checkpoint=Lowered("gpt2")).runner()
    with pytest.raises(RuntimeInputError, match="a token is outside the table of 97"):
        host.runner().decoder.prefill([[VOCAB], [1]])


def test_tokens_that_something_else_reads_stay() -> None:
    module = canonical("llama")
    ids = module.input("input_ids")
    kept = module.output("logits").producer()
    assert kept is not None
    node = ir.node("Cast", [ids], {"to": ir.DataType.FLOAT})
    total = ir.node("ReduceSum", [node.outputs[0]], {"keepdims": 0})
    summed = ir.node("Add", [kept.outputs[0], total.outputs[0]])
    module.graph.extend([node, total, summed])
    old, new = kept.outputs[0], summed.outputs[0]
    new.shape, new.type, old.name, new.name = old.shape, old.type, "before", "logits"
    module.graph.outputs[0] = new
    apply(module, "token-embedding")
    assert [v.name for v in module.graph.inputs][:3] == ["inputs_embeds", "input_ids", "position_ids"]


@pytest.mark.parametrize("changed_by", ["merge-lora", "fp16-clip"])
def test_what_the_host_cannot_do_is_refused(changed_by: str) -> None:
    module = canonical("llama")
    module.graph.initializers["model.embed_tokens.weight"].metadata_props[CHANGED_KEY] = changed_by
    with pytest.raises(PassError, match=r"an earlier pass has changed the table model\.embed_tokens\.weight"):
        apply(module, "token-embedding")
    module = canonical("llama")
    apply(module, "token-embedding{side=graph}")
    assert module.input("input_ids").consumers()
    apply(module, "token-embedding")
    module.graph.inputs[0].name = "input_ids"
    with pytest.raises(PassError, match="the tokens are looked up in 0 tables, not in one"):
        apply(module, "token-embedding")


def look_up(module: Module) -> ir.Node:
    """The node that looks up the tokens."""
    return next(n for n in module.graph if n.op_type == "Gather" and module.input("input_ids") in n.inputs)


@pytest.mark.parametrize("name", ["llama", "gemma2"], ids=["a table of its own", "a table that is tied"])
def test_a_clipped_table_is_not_the_hosts(name: str) -> None:
    """The checkpoint has the numbers from before."""
    module = canonical(name)
    table = look_up(module).inputs[0]
    assert table is not None and table.const_value is not None
    numbers = table.const_value.numpy().copy()
    numbers[3, 0] = 1e9
    table.const_value = ir.tensor(numbers, name=table.name)
    with pytest.raises(PassError, match=r"an earlier pass has changed the table \S+\.weight"):
        apply(module, "fp16-clip{weights=true},token-embedding")


def test_rows_of_two_tables_are_not_one_input() -> None:
    """Models have a second embedding of each token, for every layer."""
    module = canonical("llama")
    node = look_up(module)
    table, found = node.inputs[0], node.outputs[0]
    assert table is not None and table.const_value is not None
    second = ir.val("second", const_value=ir.tensor(-table.const_value.numpy(), name="second"))
    second.metadata_props[WEIGHT_KEY] = "model.second.weight"
    module.graph.register_initializer(second)
    readers = list(found.uses())
    b = Rewriter(module, "fault").at(readers[0].node)
    more = b("Gather", second, node.inputs[1], shape=found.shape, dtype=found.dtype)
    total = b("Add", found, more, shape=found.shape, dtype=found.dtype)
    for use in readers:
        use.node.replace_input_with(use.idx, total)
    with pytest.raises(PassError, match="the tokens are looked up in 2 tables, not in one"):
        apply(module, "token-embedding")


def test_the_rows_of_other_numbers_than_the_tokens_are_not_the_hosts_to_find() -> None:
    """A shifted look-up, as models have for positions that start behind an offset."""
    module = canonical("llama")
    node, ids = look_up(module), module.input("input_ids")
    b = Rewriter(module, "fault").at(node)
    node.replace_input_with(1, b("Mod", b("Add", ids, b.const(2)), b.const(VOCAB), shape=ids.shape, dtype=ids.dtype))
    with pytest.raises(PassError, match="the tokens are looked up in 0 tables, not in one"):
        apply(module, "token-embedding")


@pytest.mark.parametrize("flat", [[-1], [1, -1]], ids=["no batch", "one row"])
def test_rows_of_flattened_tokens_are_not_the_hosts_to_lay_out(flat: list[int]) -> None:
    module = canonical("llama")
    node, ids = look_up(module), module.input("input_ids")
    found = node.outputs[0]
    assert found.shape is not None
    width = found.shape[2]
    readers, shape = list(found.uses()), found.shape
    b = Rewriter(module, "fault").at(node)
    node.replace_input_with(1, b("Reshape", ids, b.const(flat), shape=[*flat[:-1], None], dtype=ids.dtype))
    found.shape = ir.Shape([*flat[:-1], None, width])
    sizes = b("Concat", b("Shape", ids), b.const([width]), axis=0)
    back = Rewriter(module, "fault").at(readers[0].node)("Reshape", found, sizes, shape=shape, dtype=found.dtype)
    for use in readers:
        use.node.replace_input_with(use.idx, back)
    with pytest.raises(PassError, match="the tokens are looked up in 0 tables, not in one"):
        apply(module, "token-embedding")


def test_a_table_of_another_precision_is_not_the_hosts() -> None:
    """Its rows would go in as they are stored, where the graph expects them as it computes."""
    module = canonical("llama")
    module.graph.initializers["model.embed_tokens.weight"].dtype = ir.DataType.BFLOAT16
    with pytest.raises(PassError, match="the tokens are looked up in 0 tables, not in one"):
        apply(module, "token-embedding")


def test_a_table_that_is_no_weight_is_not_the_hosts() -> None:
    """Numbers of the model's own code, which the host does not find in the checkpoint."""
    module = canonical("llama")
    del module.graph.initializers["model.embed_tokens.weight"].metadata_props[WEIGHT_KEY]
    with pytest.raises(PassError, match="the tokens are looked up in 0 tables, not in one"):
        apply(module, "token-embedding")


def test_every_look_up_of_the_tokens_is_the_hosts() -> None:
    module = canonical("llama")
    node = look_up(module)
    found = node.outputs[0]
    b = Rewriter(module, "fault").at(node)
    again = b("Gather", *node.inputs, shape=found.shape, dtype=found.dtype)
    readers = list(found.uses())
    total = Rewriter(module, "fault").at(readers[0].node)("Add", found, again, shape=found.shape, dtype=found.dtype)
    for use in readers:
        use.node.replace_input_with(use.idx, total)
    apply(module, "token-embedding")
    assert not any(v.name == "input_ids" for v in module.graph.inputs)
    assert "model.embed_tokens.weight" not in module.graph.initializers


def test_adapters_of_flat_layers_do_without_the_tokens() -> None:
    """A branch over ``[batch * seq, features]`` finds its rows again by the positions: the tokens may be gone."""
    module = prepare(draw(Recipe((Layer(),), gemm=True, bias=True, odd="gemm-beta")).module, LONG)
    apply(module, "canonicalize,unflatten,token-embedding,last-logits,lora{n=2 rank=2 targets=.* bias=targets}")
    flat = [n for n in module.graph if n.op_type == "Gemm"]
    assert flat and module.adapters and "input_ids" not in {v.name for v in module.graph.inputs}
