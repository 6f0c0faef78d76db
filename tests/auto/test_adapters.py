"""The Auto classes with adapters, from the folder to the text."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from passes.merge_lora import adapter_digest
from qeff_ir import QEffAutoLoraModelForCausalLM, QEffAutoPeftModelForCausalLM, QEffPeftModelForCausalLM, numerics
from qeff_ir.adapters.folder import CONFIG_FILE, read_adapter
from qeff_ir.adapters.layers import find_layers
from qeff_ir.adapters.step import Mode, lora_step
from qeff_ir.adapters.targets import regex, select, selection
from qeff_ir.errors import AdapterError, PassError, RuntimeInputError
from qeff_ir.frontend.providers.memory import Memory
from qeff_ir.frontend.source import Source
from qeff_ir.ir.module import WEIGHT_KEY, Module
from qeff_ir.passing.manager import run_pipeline
from qeff_ir.passing.pipeline import Pipeline
from tests import support
from tests.adapters.random_adapters import base, make
from tests.models import VOCAB, build

NAME = "llama"
COMPILE: dict[str, Any] = {"target": "onnxruntime", "batch_size": 2, "prefill_seq_len": 8, "ctx_len": 48}


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PeftModel]:
    folder = tmp_path_factory.mktemp("one")
    return folder, make(base(NAME), folder, 0, r=4, target_modules=["q_proj", "v_proj"], bias="none")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PeftModel]:
    folder = tmp_path_factory.mktemp("two")
    return folder, make(base(NAME), folder, 1, r=2, target_modules=["down_proj", "lm_head"])


def theirs(model: Any, ids: torch.Tensor) -> list[int]:
    with torch.no_grad():
        return model.generate(input_ids=ids[None], max_new_tokens=6, do_sample=False)[0].tolist()


def test_switching_needs_no_compilation(one: tuple[Path, PeftModel], two: tuple[Path, PeftModel]) -> None:
    model = QEffAutoPeftModelForCausalLM._opened(support.Lowered(NAME))
    model.load_adapter(one[0], "one")
    model.load_adapter(two[0], "two")
    model.compile(**COMPILE)
    package, session = model.package, model.runner().decoder.session
    ids = torch.tensor(support.prompts([6, 6], seed=2))
    plain, first, second = ([theirs(m, row) for row in ids] for m in (base(NAME), one[1], two[1]))
    assert plain[0] != first[0] != second[0]

    def ours(**kwargs: Any) -> list[list[int]]:
        return model.generate(ids, max_new_tokens=6, do_sample=False, **kwargs).tolist()

    assert ours() == plain
    model.set_adapter("two")
    assert ours() == second
    assert ours(adapters=["one", None]) == [first[0], plain[1]]
    assert ours(adapters="one") == first
    with model.disable_adapter():
        assert ours() == plain
    assert model.active_adapter == "two" and ours() == second
    model.disable_adapter()
    assert model.active_adapter is None and ours() == plain
    model.delete_adapter("one")
    with pytest.raises(AdapterError, match="'one'"):
        ours(adapters=["one", "two"])
    assert ours(adapters=["two", "two"]) == second
    with pytest.raises(RuntimeInputError, match="1 adapters for 2 rows"):
        ours(adapters=["two"])
    assert model.package is package and model.runner().decoder.session is session


def test_scores_are_those_of_each_rows_adapter(one: tuple[Path, PeftModel], two: tuple[Path, PeftModel]) -> None:
    model, tokens = QEffAutoPeftModelForCausalLM._opened(support.Lowered(NAME)), [7, 33]
    model.load_adapter(one[0], "one")
    model.load_adapter(two[0], "two")
    model.compile(**COMPILE)
    ids = torch.tensor(support.prompts([6, 6, 6], seed=2))

    def right(models: list[Any]) -> Any:
        with torch.no_grad():
            rows = [m(input_ids=row[None]).logits[0, -1, tokens] for m, row in zip(models, ids, strict=True)]
        return torch.stack(rows).softmax(1).numpy()

    plain, limit = right([base(NAME)] * 3), numerics.bound(6 * 3)
    model.generate(ids[:2], max_new_tokens=1, adapters="two")  # leaves nothing to the next request
    assert numerics.error_over_rms(model.score(tokens=tokens, input_ids=ids), plain) <= limit
    model.set_adapter("one")
    first, mixed = right([one[1]] * 3), right([two[1], base(NAME), one[1]])
    assert min(numerics.error_over_rms(first, plain), numerics.error_over_rms(first, mixed)) > 100 * limit
    assert numerics.error_over_rms(model.score(tokens=tokens, input_ids=ids), first) <= limit
    found = model.score(tokens=tokens, input_ids=ids, adapters=["two", None, "one"])
    assert numerics.error_over_rms(found, mixed) <= limit


def test_what_a_block_without_adapters_changes_stays_as_in_peft(
    one: tuple[Path, PeftModel], two: tuple[Path, PeftModel]
) -> None:
    model = QEffAutoPeftModelForCausalLM._opened(support.Lowered(NAME))
    reference = PeftModel.from_pretrained(copy.deepcopy(base(NAME)), one[0], "one")
    reference.load_adapter(two[0], "two")
    for name, (folder, _) in (("one", one), ("two", two)):
        model.load_adapter(folder, name)
    for either in (model, reference):
        either.set_adapter("one")
        with either.disable_adapter():
            either.set_adapter("two")
        assert either.active_adapter == "two"
    with model.disable_adapter(), model.disable_adapter():
        assert model.active_adapter is None
    assert model.active_adapter == "two"
    with model.disable_adapter():
        model.delete_adapter("two")
    assert (model.active_adapter, model.adapters) == (None, ["one"])


def test_what_is_left_open_fits_all_that_is_loaded(
    one: tuple[Path, PeftModel], two: tuple[Path, PeftModel], tmp_path: Path
) -> None:
    biased, other = tmp_path / "biased", tmp_path / "other"
    make(base("bloom"), biased, 0, r=2, target_modules=["query_key_value"], lora_bias=True)
    make(base("bloom"), other, 0, r=3, target_modules=["query_key_value"], bias="all")
    loaded = [read_adapter(folder) for folder in (one[0], two[0])]

    def step(adapters: list[Any], **given: Any) -> Any:
        wanted: dict[str, Any] = {"mode": "slots", "retained": False}
        wanted |= dict.fromkeys(("slots", "rank", "targets", "bias"))
        return lora_step(adapters, **{**wanted, **given})

    assert [step(loaded * count).n for count in (0, 1, 2, 3)] == [4, 4, 4, 6]
    assert (step([]).rank, step(loaded).rank, step(loaded[1:]).rank) == (16, 4, 2)
    assert step([]).targets == "all-linear" and step(loaded).targets == regex([*loaded[0].layers, *loaded[1].layers])
    biases = [step([*loaded, *map(read_adapter, more)]).bias for more in ([], [biased], [other], [biased, other])]
    assert biases == ["none", "targets", "all", "all"]
    asked = step(loaded, slots=1, rank=9, targets="q_proj", bias="targets", mode="single", retained=True)
    assert (asked.n, asked.rank, asked.targets, asked.bias) == (1, 9, "q_proj", "targets")
    assert (asked.mode, asked.retained) == ("single", True)


def test_a_peft_model_in_memory_stays_as_it_is(two: tuple[Path, PeftModel], one: tuple[Path, PeftModel]) -> None:
    peft_model = one[1]
    ids = torch.tensor(support.prompts([6, 6], seed=2))
    before = [theirs(peft_model, row) for row in ids]
    names = [name for name, _ in peft_model.named_modules()]
    model = QEffPeftModelForCausalLM(peft_model)
    model.load_adapter(two[0], "two")
    model.compile(**COMPILE)
    assert model.adapters == ["default", "two"] and model.active_adapter == "default"
    assert model.generate(ids, max_new_tokens=6, do_sample=False).tolist() == before
    assert [name for name, _ in peft_model.named_modules()] == names
    assert [theirs(peft_model, row) for row in ids] == before


def test_finite_adapters(one: tuple[Path, PeftModel], two: tuple[Path, PeftModel]) -> None:
    model = QEffAutoLoraModelForCausalLM._opened(support.Lowered(NAME))
    for name, (folder, _) in (("x", one), ("y", two)):
        model.load_adapter(folder, name)
    assert model.active_adapter_to_id == {"x": 1, "y": 2}
    model.compile(**COMPILE)
    ids = torch.tensor(support.prompts([6, 6], seed=2))
    out = model.generate(ids, prompt_to_adapter_mapping=["y", "base"], max_new_tokens=6, do_sample=False)
    assert out.tolist() == [theirs(two[1], ids[0]), theirs(base(NAME), ids[1])]
    assert model.active_adapter_to_id == {"x": 1, "y": 2}


def test_finite_adapters_answer_as_the_base_model_unless_a_prompt_names_one(one: tuple[Path, PeftModel]) -> None:
    """Also while one is active, which is what the other class takes."""
    model = QEffAutoLoraModelForCausalLM._opened(support.Lowered(NAME))
    model.load_adapter(one[0], "one")
    model.set_adapter("one")
    model.compile(**COMPILE)
    ids = torch.tensor(support.prompts([6, 6], seed=2))
    expected = [theirs(base(NAME), row) for row in ids]
    assert model.generate(ids, max_new_tokens=6, do_sample=False).tolist() == expected
    assert expected != [theirs(one[1], row) for row in ids]


@pytest.mark.parametrize("target", ["onnxruntime", "ai100"])
def test_a_slot_below_zero_is_the_base_model(one: tuple[Path, PeftModel], target: str) -> None:
    """Not the last one, counted from the end: hosts give -1 for rows that idle."""
    model = QEffAutoPeftModelForCausalLM._opened(support.Lowered(NAME))
    model.load_adapter(one[0], "one")
    model.compile(**dict[str, Any](COMPILE, target=target, emit_only=target == "ai100"), adapter_slots=1)
    decoder = model.runner(threads=1).decoder
    answers: dict[int, Any] = {}
    for slot in (0, -1, -7, 1):
        decoder.lora_ids[:] = slot
        answers[slot] = decoder.prefill(support.prompts([5, 7]))
    assert np.array_equal(answers[-1], answers[0]) and np.array_equal(answers[-7], answers[0])
    assert not np.array_equal(answers[1], answers[0])


def test_there_is_a_slot_for_every_adapter_that_is_loaded(one: tuple[Path, PeftModel]) -> None:
    model = QEffAutoPeftModelForCausalLM._opened(support.Lowered(NAME))
    names = [f"copy{number}" for number in range(5)]
    for name in names:
        model.load_adapter(one[0], name)
    model.compile(**dict[str, Any](COMPILE, batch_size=len(names)))
    model.use_adapters(names)
    assert model.runner().decoder.lora_ids.tolist() == [1, 2, 3, 4, 5]


def test_a_compilation_that_fails_leaves_the_model_as_it_was(one: tuple[Path, PeftModel]) -> None:
    model = QEffAutoPeftModelForCausalLM._opened(support.Lowered(NAME))
    model.load_adapter(one[0], "one")
    model.set_adapter("one")
    model.compile(**COMPILE)
    package, runner = model.package, model.runner()
    with pytest.raises(AdapterError, match="has rank 4"):
        model.compile(**COMPILE, max_lora_rank=2)
    assert model.package is package and model.runner() is runner
    ids = torch.tensor(support.prompts([6, 6], seed=2))
    assert model.generate(ids, max_new_tokens=6, do_sample=False).tolist() == [theirs(one[1], row) for row in ids]


def test_a_merged_adapter_is_the_base_model(two: tuple[Path, PeftModel]) -> None:
    model = QEffAutoPeftModelForCausalLM._opened(support.Lowered(NAME))
    model.load_adapter(two[0], "two")
    model.merge_adapter("two")
    model.compile(**COMPILE)
    assert model.adapters == []
    ids = torch.tensor(support.prompts([6, 6], seed=2))
    assert model.generate(ids, max_new_tokens=6, do_sample=False).tolist() == [theirs(two[1], row) for row in ids]


def test_an_active_adapter_that_is_merged_is_active_no_more(two: tuple[Path, PeftModel]) -> None:
    model = QEffAutoPeftModelForCausalLM._opened(support.Lowered(NAME))
    model.load_adapter(two[0], "two")
    model.set_adapter("two")
    model.merge_adapter()
    assert model.active_adapter is None
    model.compile(**COMPILE)
    ids = torch.tensor(support.prompts([6, 6], seed=2))
    assert model.generate(ids, max_new_tokens=6, do_sample=False).tolist() == [theirs(two[1], row) for row in ids]


def test_merging_reads_no_weight_before_it_is_written(two: tuple[Path, PeftModel], monkeypatch: Any) -> None:
    import passes.merge_lora as merge

    monkeypatch.setattr(merge, "numbers", lambda _entry: pytest.fail("a tensor was read"))
    module = support.canonical(NAME)
    run_pipeline(module, Pipeline((merge.MergeLora(adapter=str(two[0])),)), check=2)
    value = next(v for n, v in module.graph.initializers.items() if n.endswith("0.mlp.down_proj.weight"))
    assert value.const_value is not None
    with pytest.raises(pytest.fail.Exception, match="a tensor was read"):
        value.const_value.numpy()


class Twice(torch.nn.Module):
    """A block that is used twice."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x + self.inner(x))


def shared(kind: str) -> Any:
    """A model in which two modules share a weight, or one module is used twice."""
    model: Any = build(NAME)[1]
    first, second = model.model.layers
    if kind == "twice":
        first.mlp = Twice(first.mlp)
    else:
        second.mlp.up_proj.weight = first.mlp.up_proj.weight
    return model


@pytest.mark.parametrize("merged", [True, False], ids=["merged", "slots"])
@pytest.mark.parametrize("kind", ["twice", "weight"])
def test_what_is_shared_changes_where_the_adapter_says(kind: str, merged: bool, tmp_path: Path) -> None:
    """In both uses of a module, and in one of two modules that share a weight."""
    theirs = make(shared(kind), tmp_path, 3, r=4, target_modules=r".*layers\.0\.mlp(\.inner)?\.up_proj")
    model = QEffAutoPeftModelForCausalLM._opened(Source(Memory(shared(kind))))
    model.load_adapter(tmp_path, "it")
    if merged:
        model.merge_adapter("it")
    model.compile(**COMPILE)
    ids = torch.tensor(support.prompts([7, 7]))
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits[:, -1].numpy()
        plain = shared(kind)(input_ids=ids).logits[:, -1].numpy()
    decoder = model.runner(threads=1).decoder
    if not merged:
        model.use_adapters(["it"] * 2)
    limit = numerics.bound(numerics.depth(support.lowered(NAME)))
    assert numerics.error_over_rms(decoder.prefill(ids.tolist()), expected) <= limit
    assert numerics.error_over_rms(plain, expected) > 100 * limit


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_only_the_named_user_of_a_tied_weight_gets_a_branch(target: str) -> None:
    module = support.canonical("gemma2")
    support.apply(module, f"last-logits,lora{{targets={target}}}")
    assert [str(found.path).rpartition(".")[2] for found in module.adapters] == [target] * 2


def test_a_table_that_is_split_from_the_head_has_a_name_of_its_own(tmp_path: Path) -> None:
    """Checkpoints and adapters are matched with the graph by these names."""
    make(base("gemma2"), tmp_path, 0, r=4, target_modules=["embed_tokens"])
    module = support.canonical("gemma2")
    before = {v.metadata_props.get(WEIGHT_KEY) for v in module.graph.initializers.values()}
    assert "model.embed_tokens.weight" not in before and "lm_head.weight" in before
    support.apply(module, f'merge-lora{{adapter="{tmp_path}"}}')
    names = [v.metadata_props[WEIGHT_KEY] for v in module.graph.initializers.values() if WEIGHT_KEY in v.metadata_props]
    assert len(set(names)) == len(names)
    assert set(names) == {*before, "model.embed_tokens.weight"} - {None}


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_a_split_weight_has_the_shape_that_is_declared(target: str, tmp_path: Path) -> None:
    """As it is looked up, and transposed as a product takes it."""
    make(base("gemma2"), tmp_path, 0, r=4, target_modules=[target])
    module = support.canonical("gemma2")
    support.apply(module, f'merge-lora{{adapter="{tmp_path}"}},kv-retention{{layout=tensor-scatter}}')
    sizes = module.specializations[0].symbols
    declared = support.assert_true_shapes(module, tmp_path / "run", support.random_feeds(module, sizes), sizes)
    assert (32, VOCAB) in declared


class Heads(torch.nn.Module):
    """A block whose layer sees rows, heads and tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.inner = torch.nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.unflatten(-1, (2, 16)).transpose(1, 2)).transpose(1, 2).flatten(-2)


def headed() -> Any:
    """A model with a layer behind an axis of as many heads as there are rows."""
    model: Any = build(NAME, num_hidden_layers=1)[1]
    model.model.layers[0].mlp = Heads()
    return model


def test_a_layer_that_sees_heads_has_the_adapter_of_the_row(tmp_path: Path) -> None:
    adapted = make(headed(), tmp_path, 3, r=4, target_modules=["inner"])
    model = QEffAutoPeftModelForCausalLM._opened(Source(Memory(headed())))
    model.load_adapter(tmp_path, "it")
    model.compile(**COMPILE)
    ids = torch.tensor(support.prompts([7, 7]))
    with torch.no_grad():
        first, second = (m(input_ids=ids).logits[:, -1].numpy() for m in (adapted, headed()))
    model.use_adapters(["it", None])
    found = model.runner(threads=1).decoder.prefill(ids.tolist())
    limit = numerics.bound(numerics.depth(support.lowered(NAME)))
    for row, expected, other in ((0, first, second), (1, second, first)):
        assert numerics.error_over_rms(found[row], expected[row]) <= limit
        assert numerics.error_over_rms(other[row], expected[row]) > 100 * limit


def test_every_copy_of_a_row_has_the_adapter_of_the_row(one: tuple[Path, PeftModel]) -> None:
    model = QEffAutoPeftModelForCausalLM._opened(support.Lowered(NAME))
    model.load_adapter(one[0], "one")
    model.compile(**dict[str, Any](COMPILE, batch_size=4))
    ids = torch.tensor(support.prompts([6, 6], seed=2))
    model.generate(ids, adapters=["one", None], num_return_sequences=2, do_sample=True, max_new_tokens=2)
    assert model.runner().decoder.lora_ids.tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("mode", ["slots", "single"])
def test_an_adapter_in_the_place_of_another_leaves_nothing_of_it(
    mode: Mode, one: tuple[Path, PeftModel], two: tuple[Path, PeftModel]
) -> None:
    """The second changes other layers than the first, which then must answer as the base model's."""
    ids = torch.tensor(support.prompts([6, 6], seed=2))
    model = QEffAutoPeftModelForCausalLM._opened(support.Lowered(NAME))
    model.load_adapter(one[0], "one")
    model.load_adapter(two[0], "two")
    model.compile(**COMPILE, lora_mode=mode)
    model.set_adapter("one")
    assert model.generate(ids, max_new_tokens=6, do_sample=False).tolist() == [theirs(one[1], row) for row in ids]
    model.load_adapter(two[0], "one")
    expected = [theirs(two[1], row) for row in ids]
    assert model.generate(ids, max_new_tokens=6, do_sample=False).tolist() == expected
    assert expected != [theirs(one[1], row) for row in ids]


def test_an_adapter_that_is_named_twice_is_merged_once(two: tuple[Path, PeftModel]) -> None:
    model = QEffAutoPeftModelForCausalLM._opened(support.Lowered(NAME))
    model.load_adapter(two[0], "two")
    model.merge_adapter(["two", "two"])
    assert (model.adapters, model._merged) == ([], [two[0]])


def test_one_adapter_at_a_time_is_loaded_beside_another(
    one: tuple[Path, PeftModel], two: tuple[Path, PeftModel]
) -> None:
    model = QEffAutoPeftModelForCausalLM._opened(support.Lowered(NAME))
    model.load_adapter(one[0], "one")
    model.set_adapter("one")
    model.compile(lora_mode="single", lora_targets="q_proj,v_proj,down_proj,lm_head", **COMPILE)
    ids = torch.tensor(support.prompts([6, 6], seed=2))
    plain, first, second = ([theirs(m, row) for row in ids] for m in (base(NAME), one[1], two[1]))
    assert plain != first != second

    def ours() -> list[list[int]]:
        return model.generate(ids, max_new_tokens=6, do_sample=False).tolist()

    assert ours() == first
    model.load_adapter(two[0], "two")
    assert ours() == first
    model.set_adapter("two")
    assert ours() == second
    model.disable_adapter()
    assert ours() == plain
    model.load_adapter(one[0], "two")  # in the place of one that is not written now
    model.set_adapter("two")
    assert ours() == first
    model.load_adapter(two[0], "two")  # in the place of one that is
    assert ours() == second


def test_an_adapter_that_changed_is_not_merged(two: tuple[Path, PeftModel]) -> None:
    with pytest.raises(PassError, match="has changed"):
        support.apply(support.canonical(NAME), f'merge-lora{{adapter="{two[0]}" digest=0000}}')


def test_an_adapter_that_was_trained_again_is_not_merged(tmp_path: Path) -> None:
    """Only its weights are others: the configuration is the same."""
    digests: list[str] = []
    configs: list[bytes] = []
    for seed in (0, 1):
        make(base(NAME), tmp_path, seed, r=4, target_modules=["q_proj"])
        digests.append(adapter_digest(tmp_path)[:16])
        configs.append((tmp_path / CONFIG_FILE).read_bytes())
    assert configs[0] == configs[1]
    step = f'merge-lora{{adapter="{tmp_path}" digest=%s}}'
    with pytest.raises(PassError, match="has changed"):
        support.apply(support.canonical(NAME), step % digests[0])
    support.apply(support.canonical(NAME), step % digests[1])


def test_an_adapter_that_is_scaled_otherwise_is_not_merged(tmp_path: Path) -> None:
    """Only its configuration is another: the weights are the same."""
    make(base(NAME), tmp_path, 0, r=4, lora_alpha=4, target_modules=["q_proj"])
    step = f'merge-lora{{adapter="{tmp_path}" digest={adapter_digest(tmp_path)[:16]}}}'
    support.apply(support.canonical(NAME), step)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config | {"lora_alpha": 8}))
    with pytest.raises(PassError, match="has changed"):
        support.apply(support.canonical(NAME), step)


def test_a_table_with_an_adapter_in_it_is_not_the_hosts_to_look_up(tmp_path: Path) -> None:
    """The host would read the checkpoint's, which is without."""
    make(base(NAME), tmp_path, 0, r=4, target_modules=["embed_tokens"])
    with pytest.raises(PassError, match=r"an earlier pass has changed the table model\.embed_tokens\.weight"):
        support.apply(support.canonical(NAME), f'merge-lora{{adapter="{tmp_path}"}},token-embedding')


def test_the_text_of_a_pipeline_is_enough() -> None:
    module = support.canonical(NAME)
    support.apply(module, 'last-logits,lora{mode=slots n=3 rank=5 targets="q_proj,up_proj" layers=1}')
    shapes = {item.input: item.shape for item in module.adapters}
    assert shapes == {
        "model.layers.1.self_attn.q_proj.lora_a_weights": (4, 32, 5),
        "model.layers.1.self_attn.q_proj.lora_b_weights": (4, 5, 32),
        "model.layers.1.mlp.up_proj.lora_a_weights": (4, 32, 5),
        "model.layers.1.mlp.up_proj.lora_b_weights": (4, 5, 64),
    }
    assert module.input("lora_ids").shape == ("batch_size", 1)


def rename(module: Module, old: str, new: str) -> None:
    """Give layers other names, as another model has them."""
    for found in (*module.graph, *module.graph.initializers.values()):
        found.metadata_props.update({key: text.replace(old, new) for key, text in found.metadata_props.items()})


@pytest.mark.parametrize(
    ("which", "numbers"),
    [("layers=1 layers-pattern=layers", "1"), ("layers=0 layers-pattern=experts", "01"), ("layers=0", "0")],
    ids=["of the decoder", "of experts", "of the outermost list"],
)
def test_numbers_are_those_of_the_list_that_is_named(which: str, numbers: str) -> None:
    module = support.canonical("llama")
    rename(module, ".mlp.", ".mlp.experts.0.")
    support.apply(module, f'last-logits,lora{{targets="gate_proj,up_proj" exclude=up_proj {which}}}')
    assert {a.path for a in module.adapters} == {f"model.layers.{n}.mlp.experts.0.gate_proj" for n in numbers}


def test_single_mode_has_the_names_of_the_contract() -> None:
    module = support.canonical(NAME)
    support.apply(module, "last-logits,lora{mode=single rank=5 targets=q_proj retained=true}")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert module.input(name).shape == (5, 32)
    producer = module.output(f"{name}_RetainedState").producer()
    assert producer is not None and producer.name == f"{name}_identity"


def test_single_mode_names_the_factors_of_a_table_as_peft_does() -> None:
    module = support.canonical(NAME)
    support.apply(module, "last-logits,lora{mode=single rank=5 targets=embed_tokens}")
    table = "base_model.model.model.embed_tokens"
    shapes = {f"{table}.lora_embedding_A": (5, VOCAB), f"{table}.lora_embedding_B": (32, 5)}
    assert {a.input: a.shape for a in module.adapters} == shapes


@pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:The following")  # what PEFT tells about its own defaults
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gpt-oss"])
def test_all_linear_layers_are_those_that_peft_adapts(name: str) -> None:
    """Without the LM head, and without products of parameters that belong to no linear layer."""
    module = support.canonical(name)
    support.apply(module, "last-logits,lora{targets=all-linear}")
    theirs = get_peft_model(copy.deepcopy(base(name)), LoraConfig(target_modules="all-linear"))
    assert {found.path for found in module.adapters} == set(theirs.targeted_module_names)


def test_the_head_is_known_by_what_it_makes() -> None:
    """Not by its name, which differs from model to model."""
    module = support.canonical("llama")
    rename(module, "lm_head", "embed_out")
    assert "embed_out" in {layer.path for layer in find_layers(module)}
    support.apply(module, "last-logits,lora{targets=all-linear}")
    adapted = {found.path for found in module.adapters}
    assert "model.layers.1.mlp.down_proj" in adapted and "embed_out" not in adapted


def test_the_cache_that_is_named_has_the_base_model_too(tmp_path: Path) -> None:
    """A hub cache as the hub's client lays it out: the adapter and its base model, both known there only."""
    cache, commit = tmp_path / "cache", "0" * 40

    def snapshot(repository: str) -> Path:
        entry = cache / f"models--{repository.replace('/', '--')}"
        (entry / "refs").mkdir(parents=True)
        (entry / "refs" / "main").write_text(commit)
        return entry / "snapshots" / commit

    base(NAME).save_pretrained(snapshot("some/base"))
    folder = snapshot("some/adapter")
    make(base(NAME), folder, 0, r=2, target_modules=["q_proj"])
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**config, "base_model_name_or_path": "some/base"}))
    model = QEffAutoPeftModelForCausalLM.from_pretrained("some/adapter", adapter_name="one", cache_dir=cache)
    assert model.adapters == ["one"]
    model.compile(emit_only=True, compile_dir=tmp_path / "package", **COMPILE)
    assert (tmp_path / "package" / "model.onnx").is_file()


def test_targets_that_name_nothing_are_told() -> None:
    with pytest.raises(PassError, match=r"no layer is named 'w_proj'.*q_proj"):
        support.apply(support.canonical(NAME), "last-logits,lora{targets=w_proj}")


def test_the_regex_names_just_the_given_layers(one: tuple[Path, PeftModel]) -> None:
    adapter = read_adapter(one[0])
    others = ["model.layers.0.self_attn.k_proj", "model.layers.11.self_attn.q_proj", "model.layers.2.self_attn.v_proj"]
    chosen = select(selection(regex(adapter.layers)), [*adapter.layers, *others], [])
    assert chosen == list(adapter.layers) and len(chosen) == 4


def test_the_regex_keeps_numbers_of_one_name_apart() -> None:
    """A layer and an expert: the other two pairs of the same numbers are not named."""
    paths = ["layers.0.experts.1.up", "layers.1.experts.0.up"]
    others = ["layers.0.experts.0.up", "layers.1.experts.1.up"]
    assert select(selection(regex(paths)), [*paths, *others], []) == paths
