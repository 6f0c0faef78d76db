"""What `QEFFAutoModel` and its heads take, and what they refuse."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    CLIPConfig,
    ViTConfig,
    ViTModel,
)

from qeff_ir import (
    QEFFAutoModel,
    QEFFAutoModelForCTC,
    QEFFAutoModelForSequenceClassification,
    QEFFAutoModelForTokenClassification,
    numerics,
)
from qeff_ir.debug.plain import plain_module
from qeff_ir.errors import CompileError, ModelLoadError, RuntimeInputError, UnsupportedModelError
from qeff_ir.frontend.forward_source import ForwardOptions, ForwardSource
from qeff_ir.frontend.providers.memory import Memory
from qeff_ir.frontend.sentence import read_sentence_config
from qeff_ir.runtime.interface import interface_of
from tests.encoders import ENCODERS, build, example

PAIR: dict[str, tuple[int | str, ...]] = dict.fromkeys(("input_ids", "attention_mask"), ("batch_size", "seq_len"))
IDS = {n: v.numpy() for n, v in example("distilbert", PAIR).items()}


def saved(folder: Path, name: str = "distilbert") -> Path:
    build(name).save_pretrained(folder)
    return folder


def exact(model: Any, inputs: Any) -> Any:
    """What transformers makes of the inputs in float64."""
    tensors = {k: torch.as_tensor(v) for k, v in inputs.items()}
    with torch.no_grad():
        return copy.deepcopy(model).double()(
            **{k: v.double() if v.is_floating_point() else v for k, v in tensors.items()}
        )


def reference(name: str, **inputs: Any) -> Any:
    return exact(build(name), inputs)


@pytest.fixture(scope="module")
def vit() -> QEFFAutoModel:
    model = QEFFAutoModel(build("vit"))
    model.compile(target="onnxruntime")
    return model


class Weighted(torch.nn.Module):
    """A pooling of the user's, with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.score = torch.nn.Linear(32, 1)

    def forward(self, last_hidden_states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        score = self.score(last_hidden_states)[..., 0].masked_fill(attention_mask == 0, -1e4)
        return (score.softmax(-1)[..., None] * last_hidden_states).sum(1)


@pytest.mark.parametrize("target", ["onnxruntime", "ai100"])
def test_a_pooling_of_the_users(target: str) -> None:
    model = QEFFAutoModel(build("distilbert"), pooling=(own := Weighted()), normalize=True)
    model.compile(target=target, seq_len=[12], emit_only=True)
    with torch.no_grad():
        pooled = copy.deepcopy(own).double()(
            reference("distilbert", **IDS).last_hidden_state, torch.tensor(IDS["attention_mask"])
        )
    expected = torch.nn.functional.normalize(pooled).numpy()
    assert numerics.error_over_rms(model.generate(IDS)["output"], expected) <= numerics.bound(8)


def test_a_sentence_transformers_folder_brings_its_pooling(tmp_path: Path) -> None:
    saved(tmp_path)
    kinds = ["Transformer", "Pooling", "Normalize"]
    modules = [
        {"path": "" if i == 0 else f"{i}_{kind}", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    pooling = tmp_path / "1_Pooling" / "config.json"

    def text(**kwargs: Any) -> str:
        return str(QEFFAutoModel.from_pretrained(tmp_path, **kwargs).pipeline_for("onnxruntime"))

    pooling.write_text(json.dumps({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}))
    assert "embedding{pooling=cls normalize=true}" in text()
    assert "embedding{pooling=cls}" in text(normalize=False)
    assert "embedding{pooling=max normalize=true}" in text(pooling="max")
    assert "embedding{pooling=max}" in text(pooling="max", normalize=False)
    assert 'embedding{pooling="none" normalize=true}' in text(pooling=lambda hidden, mask: hidden[:, 0] + mask[:, :1])
    assert 'embedding{pooling="none"}' in text(pooling="none")
    pooling.write_text(json.dumps({"pooling_mode": ["mean", "lasttoken"]}))
    assert "embedding{pooling=mean+last normalize=true dim=7}" in text(dim=7)
    pooling.write_text(json.dumps({"pooling_mode": "median"}))
    with pytest.raises(ModelLoadError, match="asks for the pooling 'median': there is cls, max, mean"):
        text()
    modules[2]["type"] = "sentence_transformers.models.CNN"
    pooling.write_text("{}")
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UnsupportedModelError, match="has a module of type CNN, which is not read"):
        text()
    modules[1]["path"] = "../elsewhere"
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ModelLoadError, match=r"names '\.\./elsewhere', a folder outside the model: refused"):
        text()


def test_poolings_that_are_switched_on_are_joined_in_one_order(tmp_path: Path) -> None:
    """sentence-transformers' own, whichever the configuration names first."""
    modes = ("lasttoken", "weightedmean_tokens", "mean_sqrt_len_tokens", "mean_tokens", "max_tokens", "cls_token")
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{m}": True for m in modes}))
    (tmp_path / "modules.json").write_text(json.dumps([TRANSFORMER, POOLING]))
    config = read_sentence_config(tmp_path)
    assert config is not None and config.pooling == "cls+max+mean+mean-sqrt-len+weighted-mean+last"


TRANSFORMER, POOLING, NORMALIZE = ({"path": p, "type": f"sentence_transformers.models.{k}"} for p, k in
    (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")))  # fmt: skip


@pytest.mark.parametrize(
    ("modules", "pooling", "message"),
    [
        ([], {}, "has the modules of nothing"),
        ([POOLING], {}, "has the modules Pooling: what is read is Transformer, then Pooling, then Dense and Normalize"),
        ([TRANSFORMER, POOLING, POOLING], {}, "Transformer, Pooling, Pooling"),
        ([TRANSFORMER, NORMALIZE, POOLING], {}, "Transformer, Normalize, Pooling"),
        ([TRANSFORMER | {"path": 5}], {}, "the folder 5, which is no name"),
        ([TRANSFORMER | {"path": "a\0b"}], {}, "names a folder that cannot be"),
        ([TRANSFORMER | {"path": "a" * 5000}], {}, "names a folder that cannot be"),
        ([TRANSFORMER, POOLING], {"pooling_mode": 5}, "the pooling '5'"),
        ([TRANSFORMER, POOLING], {"pooling_mode": [["mean"]]}, "the pooling"),
        ([TRANSFORMER, POOLING], {"pooling_mode": []}, "the pooling of no name"),
        ([TRANSFORMER, POOLING], {"include_prompt": False}, "pass pooling='mean', which is the same"),
    ],
)
def test_modules_that_would_be_misread_are_refused(modules: Any, pooling: Any, message: str, tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises((ModelLoadError, UnsupportedModelError), match=message):
        QEFFAutoModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("pooling", "message"),
    [
        (
            "average",
            "there is no pooling 'average': use mean, max, cls, last, mean-sqrt-len, weighted-mean, several joined by "
            "'+', or none",
        ),
        (3, "pooling is 3: give the name of a pooling, or a torch module of (last_hidden_states, attention_mask)"),
        (
            torch.nn.Identity(),
            "the pooling Identity cannot be called with (last_hidden_states, attention_mask): too many positional "
            "arguments",
        ),
    ],
)
def test_a_bad_pooling_is_refused_at_once(pooling: Any, message: str) -> None:
    with pytest.raises(ModelLoadError) as error:
        QEFFAutoModel(build("distilbert"), pooling=pooling)
    assert str(error.value) == message


def test_an_image_of_another_size_is_refused(vit: QEFFAutoModel) -> None:
    with pytest.raises(RuntimeInputError) as error:
        vit.generate(pixel_values=np.zeros((1, 3, 20, 20), np.float32))
    assert str(error.value) == "pixel_values is [1, 3, 20, 20], the model takes [batch_size, 3, 16, 16]"
    with pytest.raises(RuntimeInputError, match="pixel_values is int64, the model takes float32"):
        vit.generate(pixel_values=np.zeros((1, 3, 16, 16), np.int64))


def test_the_height_of_an_image_comes_before_its_width() -> None:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=[8, 16],
        patch_size=4,
    )
    model = ViTModel(config).eval()
    ours = QEFFAutoModel(model)
    ours.compile(target="onnxruntime")
    images = np.random.default_rng(0).standard_normal((2, 3, 8, 16)).astype(np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(images)).last_hidden_state.numpy()
    np.testing.assert_allclose(ours.generate(pixel_values=images)["last_hidden_state"], expected, atol=1e-5)
    with pytest.raises(RuntimeInputError, match=r"the model takes \[batch_size, 3, 8, 16\]"):
        ours.generate(pixel_values=images.transpose(0, 1, 3, 2))


def test_inputs_of_different_lengths_are_refused() -> None:
    model = QEFFAutoModel(build("distilbert"))
    model.compile(target="onnxruntime", seq_len=12)
    with pytest.raises(RuntimeInputError) as error:
        model.generate(input_ids=IDS["input_ids"], attention_mask=IDS["attention_mask"][:, :5])
    assert str(error.value) == (
        "attention_mask is [2, 5], the model takes [batch_size, seq_len], here with batch_size=2, seq_len=11"
    )


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "there is no input: give pixel_values"),
        ({"input_ids": [[1]]}, "there is no input: give pixel_values"),
        ({"pixel_values": np.zeros((0, 3, 16, 16), np.float32)}, "the inputs are empty (batch_size=0): give at least"),
        (
            {"pixel_values": np.zeros((1, 3, 16, 16), np.float32), "labels": [[1]]},
            "the model is compiled without the input 'labels': it takes pixel_values",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_refused(inputs: Any, message: str, vit: QEFFAutoModel) -> None:
    with pytest.raises(RuntimeInputError) as error:
        vit.generate(inputs)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("target", ["onnxruntime", "ai100"])
def test_heads_and_pairs_of_texts(target: str) -> None:
    config = BertConfig(**dict[str, Any](ENCODERS["bert"].config, num_labels=3))
    for head, auto in (
        (QEFFAutoModelForSequenceClassification, AutoModelForSequenceClassification),
        (QEFFAutoModelForTokenClassification, AutoModelForTokenClassification),
    ):
        torch.manual_seed(0)
        theirs = auto.from_config(config, dtype=torch.float32).eval()
        ours = head(theirs, inputs=["input_ids", "attention_mask", "token_type_ids"])
        ours.compile(target=target, seq_len=[12, 16], batch_size=2, emit_only=True)
        kinds = np.tile(np.arange(IDS["input_ids"].shape[1]) > 5, (2, 1)).astype(np.int64)
        found = ours.generate(IDS, token_type_ids=kinds)["logits"]
        expected = exact(theirs, {**IDS, "token_type_ids": kinds}).logits
        other = exact(theirs, IDS).logits
        keep = IDS["attention_mask"] > 0 if found.ndim == 3 else slice(None)
        limit = numerics.bound(9)
        assert numerics.error_over_rms(found[keep], expected.numpy()[keep]) <= limit
        assert numerics.error_over_rms(other.numpy()[keep], expected.numpy()[keep]) > 100 * limit
        names = [s.name for s in ours.encoder().session.specializations]
        assert names == [f"{ours.task.graph_name}_{i}" for i in range(2)]
    with pytest.raises(RuntimeInputError, match="the input 'token_type_ids' is missing"):
        ours.generate(IDS)
    alone = head(theirs)
    alone.compile(target=target, seq_len=[12, 16], batch_size=2, emit_only=True)
    plain = alone.generate(IDS)["logits"]
    np.testing.assert_array_equal(alone.generate(IDS, token_type_ids=np.zeros_like(kinds))["logits"], plain)
    with pytest.raises(RuntimeInputError, match="compiled without the input 'token_type_ids'"):
        alone.generate(IDS, token_type_ids=kinds)


@pytest.fixture(scope="module", params=["onnxruntime", "ai100"])
def pooled(request: pytest.FixtureRequest) -> QEFFAutoModel:
    model = QEFFAutoModel(build("distilbert"), pooling="mean")
    more: dict[str, Any] = {"emit_only": True} if request.param == "ai100" else {}
    model.compile(target=request.param, seq_len=12, **more)
    return model


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": [[-1, 2]]}, "input_ids has -1, the model knows 0 to"),
        ({"input_ids": [[10**6, 2]]}, "input_ids has 1000000, the model knows 0 to"),
        ({"input_ids": np.array([[2**63 + 1]], np.uint64)}, "input_ids has 9223372036854775809, the model knows"),
        ({"input_ids": [[1, 2]], "attention_mask": [[2, -1]]}, "other numbers than 0 and 1"),
        ({"input_ids": [[1, 2], [3]]}, "input_ids cannot be read as an array"),
        ({"input_ids": [["a"]]}, "input_ids is <U1: give numbers"),
        ({"input_ids": np.ones((1, 2), complex)}, "input_ids is complex128: give numbers"),
        ({"input_ids": torch.ones(1, 2, device="meta")}, "input_ids cannot be read as an array"),
        ({"input_ids": torch.ones(1, 2, dtype=torch.bfloat16)}, "input_ids is float32, the model takes int64"),
        ([[1, 2]], "inputs is a list: give arrays by name"),
        (torch.ones(1, 2), "inputs is a Tensor: give arrays by name"),
    ],
)
def test_numbers_that_the_model_does_not_know_are_refused(inputs: Any, message: str, pooled: QEFFAutoModel) -> None:
    with pytest.raises(RuntimeInputError, match=message):
        pooled.generate(inputs)


@pytest.mark.parametrize("sizes", [(10, 20), (20, 10)])
def test_a_token_must_be_in_every_table_that_it_selects_from(sizes: tuple[int, int], tmp_path: Path) -> None:
    ids = onnx.helper.make_tensor_value_info("input_ids", onnx.TensorProto.INT64, ["batch_size", "seq_len"])
    tables = [onnx.numpy_helper.from_array(np.zeros((n, 2), np.float32), f"table{n}") for n in sizes]
    nodes = [onnx.helper.make_node("Gather", [t.name, "input_ids"], [f"{t.name}_rows"]) for t in tables]
    graph = onnx.helper.make_graph(nodes, "tables", [ids], [], tables)
    module = plain_module(ir.from_proto(onnx.helper.make_model(graph)), "tables")
    assert [port.rows for port in interface_of(module, tmp_path).inputs] == [10]


def test_all_tokens_and_masks_of_truth_values_are_known(pooled: QEFFAutoModel) -> None:
    size = build("distilbert").config.vocab_size
    ids = torch.tensor([[0, size - 1, 1]])
    mask = torch.tensor([[True, True, False]])
    cut = pooled.generate(input_ids=ids[:, :2])["output"]
    assert np.abs(pooled.generate(input_ids=ids, attention_mask=mask)["output"] - cut).max() < 1e-5
    assert np.abs(pooled.generate(input_ids=ids)["output"] - cut).max() > 1e-3
    with pytest.raises(RuntimeInputError, match=f"input_ids has {size}, the model knows 0 to {size - 1}$"):
        pooled.generate(input_ids=torch.tensor([[0, size, 1]]))


def test_a_tensor_of_bfloat16_or_with_a_gradient_is_an_array(vit: QEFFAutoModel) -> None:
    image = torch.linspace(-1, 1, 3 * 256).reshape(1, 3, 16, 16).bfloat16()
    expected = vit.generate(pixel_values=image.float().numpy())["last_hidden_state"]
    for tensor in (image, image.float().requires_grad_()):
        assert np.array_equal(vit.generate(pixel_values=tensor)["last_hidden_state"], expected)


@pytest.mark.parametrize("target", [QEFFAutoModel, QEFFAutoModelForCTC])
def test_what_is_no_model_is_refused(target: Any) -> None:
    with pytest.raises(ModelLoadError, match="Linear is no transformers model"):
        target(torch.nn.Linear(1, 1))


def test_normalize_is_true_or_false(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="normalize is 'no': give True or False"):
        QEFFAutoModel.from_pretrained(saved(tmp_path), pooling="mean", normalize="no")  # pyright: ignore[reportArgumentType]


def test_a_package_tells_whether_it_pools(pooled: QEFFAutoModel, tmp_path: Path) -> None:
    plain = QEFFAutoModel(build("distilbert"))
    plain.compile(target="onnxruntime", seq_len=12)
    for model, pools in ((pooled, True), (plain, False)):
        opened = QEFFAutoModel.from_package(model.package.folder)
        assert (opened.pools, model.pools) == (pools, pools)


def test_speech_becomes_text() -> None:
    class Processor:
        def batch_decode(self, ids: Any) -> list[str]:
            return ["".join(chr(97 + i % 26) for i in row) for row in ids]

    model = QEFFAutoModelForCTC(build("wav2vec2"))
    model.compile(target="ai100", seq_len=401, emit_only=True)
    sound = example("wav2vec2", {"input_values": ("batch_size", "seq_len")})
    expected = reference("wav2vec2", **sound).logits.argmax(-1)
    assert model.transcribe(Processor(), sound) == Processor().batch_decode(expected)
    with pytest.raises(RuntimeInputError, match="the inputs have 402 tokens, the model is compiled for 401"):
        model.transcribe(Processor(), input_values=np.zeros((1, 402), np.float32))


def test_a_checkpoint_without_a_pooler_has_one_output_less(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    saved(tmp_path, "bert")
    file = tmp_path / "model.safetensors"
    weights = {k: v for k, v in load_file(file).items() if "pooler" not in k}
    save_file(weights, file)
    model = QEFFAutoModel.from_pretrained(tmp_path)
    model.compile(target="onnxruntime", seq_len=16)
    found = model.generate(IDS)
    assert list(found) == ["last_hidden_state"]
    expected = reference("bert", **IDS).last_hidden_state.numpy()
    keep = IDS["attention_mask"] > 0
    assert numerics.error_over_rms(found["last_hidden_state"][keep], expected[keep]) <= numerics.bound(6)
    del weights["embeddings.word_embeddings.weight"]
    save_file(weights, file)
    with pytest.raises(
        ModelLoadError, match=r"has no tensor 'embeddings\.word_embeddings\.weight', which BertModel needs"
    ):
        QEFFAutoModel.from_pretrained(tmp_path).compile(target="onnxruntime")


def test_a_tower_of_two_is_taken_by_its_name(tmp_path: Path) -> None:
    config = CLIPConfig(
        text_config=ENCODERS["clip-text"].config, vision_config=ENCODERS["clip-vision"].config, projection_dim=16
    )
    torch.manual_seed(0)
    theirs = AutoModel.from_config(config, dtype=torch.float32).eval()
    theirs.save_pretrained(tmp_path)
    model = QEFFAutoModel.from_pretrained(tmp_path, part="vision")
    model.compile(target="onnxruntime")
    images = example("clip-vision", {"pixel_values": ("batch_size", 3, 16, 16)})
    expected = exact(theirs.vision_model, images).last_hidden_state.numpy()
    found = model.generate(images)["last_hidden_state"]
    assert numerics.error_over_rms(found, expected) <= numerics.bound(7)
    with pytest.raises(ModelLoadError, match="CLIPConfig has no part 'audio': there is text, vision"):
        QEFFAutoModel.from_pretrained(tmp_path, part="audio")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 65}, "seq_len=65 is more than the 64 positions of DistilBertModel: use 64 or less"),
        ({"seq_len": [8, 0]}, "seq_len must be whole numbers of at least 1, not 0"),
        ({"seq_len": []}, "DistilBertModel takes inputs of any length: give seq_len, one or several"),
    ],
)
def test_lengths_that_cannot_work_are_refused(options: Any, message: str) -> None:
    with pytest.raises(CompileError) as error:
        QEFFAutoModel(build("distilbert")).compile(target="onnxruntime", **options)
    assert str(error.value) == message


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_a_text_may_be_just_as_long_as_the_table_of_positions(name: str) -> None:
    model = build(name)
    limit = ForwardSource(Memory(model), ForwardOptions()).lower().dims["seq_len"].maximum
    assert limit is not None and limit == (64 if name == "bert" else 63)  # the other's begins with a row for padding
    tokens = torch.full((1, limit + 1), 5)
    with torch.no_grad():
        assert model(tokens[:, 1:]).last_hidden_state.shape[1] == limit
        with pytest.raises((IndexError, RuntimeError)):
            model(tokens)


def test_a_model_that_is_compiled_again_takes_what_it_is_compiled_for_last() -> None:
    model = QEFFAutoModel(build("distilbert"))
    model.compile(target="onnxruntime", seq_len=4)
    model.generate(input_ids=[[1, 2]])
    model.compile(target="onnxruntime", seq_len=12)
    found, keep = model.generate(IDS)["last_hidden_state"], IDS["attention_mask"] > 0
    expected = reference("distilbert", **IDS).last_hidden_state.numpy()
    assert numerics.error_over_rms(found[keep], expected[keep]) <= numerics.bound(7)


def test_a_forward_pass_of_other_inputs_is_another_model_to_the_cache(tmp_path: Path) -> None:
    saved(tmp_path)

    def identity(first: str) -> Any:
        source = QEFFAutoModel.from_pretrained(tmp_path, inputs=[first, "attention_mask"])._source
        assert source is not None
        return source.identity()

    assert identity("input_ids") == identity("input_ids") != identity("inputs_embeds")


def test_other_weights_are_another_model_to_the_cache_whatever_the_pooling(tmp_path: Path) -> None:
    """A pooling of the user's makes the graph tell what the package is; the checkpoint's weights are not in it."""
    found: list[Any] = []
    for seed in range(2):
        torch.manual_seed(seed)
        theirs = AutoModel.from_config(build("distilbert").config, dtype=torch.float32).eval()
        theirs.save_pretrained(tmp_path / "same-name")
        ours = QEFFAutoModel.from_pretrained(tmp_path / "same-name", pooling=Weighted())
        ours.compile(target="onnxruntime", seq_len=12)
        with torch.no_grad():
            hidden = theirs(**{k: torch.tensor(v) for k, v in IDS.items()}).last_hidden_state
            expected = Weighted()(hidden, torch.tensor(IDS["attention_mask"])).numpy()
        found.append(ours.generate(IDS)["output"])
        np.testing.assert_allclose(found[-1], expected, atol=1e-5)
    assert np.abs(found[0] - found[1]).max() > 1e-2


def test_unknown_inputs_are_refused() -> None:
    with pytest.raises(ModelLoadError, match="ViTModel has no input 'pixels': it takes pixel_values, "):
        QEFFAutoModel(build("vit"), inputs=["pixels"]).compile(target="onnxruntime")


def test_the_host_may_look_up_the_token_embeddings(tmp_path: Path) -> None:
    """The graph then takes vectors, and the table stays out of the package."""
    model = QEFFAutoModel(build("distilbert"), inputs=["inputs_embeds", "attention_mask"], pooling="mean")
    model.compile(target="ai100", seq_len=12, emit_only=True, compile_dir=tmp_path / "package")
    table = build("distilbert").get_input_embeddings()
    vectors = table(torch.tensor(IDS["input_ids"])).detach().numpy()
    found = model.generate(inputs_embeds=vectors, attention_mask=IDS["attention_mask"])["output"]
    hidden, mask = reference("distilbert", **IDS).last_hidden_state.numpy(), IDS["attention_mask"][..., None]
    expected = (hidden * mask).sum(1) / mask.sum(1)
    assert numerics.error_over_rms(found, expected) <= numerics.bound(7)
    (file,) = (tmp_path / "package").glob("*.onnx")
    names = {i.name for i in onnx.load(str(file), load_external_data=False).graph.initializer}
    assert "embeddings.position_embeddings.weight" in names and "embeddings.word_embeddings.weight" not in names
