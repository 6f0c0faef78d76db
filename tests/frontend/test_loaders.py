"""Every layout of a checkpoint gives the tensors that transformers' `from_pretrained` loads, or is refused."""

from __future__ import annotations

import copy
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoConfig, PreTrainedModel

from qeff_ir.errors import ModelLoadError, QeffError
from qeff_ir.frontend.checkpoint.ties import same_numbers
from qeff_ir.frontend.forward_source import ForwardOptions, ForwardSource
from qeff_ir.frontend.providers.folder import Folder
from qeff_ir.frontend.source import open_source
from qeff_ir.frontend.tasks import EMBEDDING, SEQUENCE_CLASSIFICATION, TOKEN_CLASSIFICATION, Task
from qeff_ir.ir.module import WEIGHT_KEY
from qeff_ir.ranges import FileRange

Tensors = dict[str, torch.Tensor]

_DECODER: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}
_KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "AutoModelForCausalLM", _DECODER),
    "tied": ("llama", "AutoModelForCausalLM", {**_DECODER, "tie_word_embeddings": True}),
    "gpt2": ("gpt2", "AutoModelForCausalLM", {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2}),
    "mixtral": ("mixtral", "AutoModelForCausalLM", {**_DECODER, "num_local_experts": 12, "num_experts_per_tok": 2}),
    "bert": ("bert", "AutoModelForSequenceClassification", {**_DECODER, "num_labels": 3}),
    "bert-tokens": ("bert", "AutoModelForTokenClassification", {**_DECODER, "num_labels": 3}),
    "bert-base": ("bert", "AutoModel", _DECODER),
    "llama-base": ("llama", "AutoModel", _DECODER),
    "llama-classes": ("llama", "AutoModelForSequenceClassification", {**_DECODER, "num_labels": 3}),
    "t5": (
        "t5",
        "AutoModelForTextEncoding",
        {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2},
    ),
}
"""Model type, auto class and configuration of tiny models."""

_TASKS: dict[str, Task] = {
    "AutoModel": EMBEDDING,
    "AutoModelForTextEncoding": EMBEDDING,
    "AutoModelForSequenceClassification": SEQUENCE_CLASSIFICATION,
    "AutoModelForTokenClassification": TOKEN_CLASSIFICATION,
}


@functools.cache
def _model(kind: str) -> PreTrainedModel:
    model_type, auto, sizes = _KINDS[kind]
    torch.manual_seed(len(kind))
    return getattr(transformers, auto).from_config(AutoConfig.for_model(model_type, **copy.deepcopy(sizes)))


@functools.cache
def _saved(kind: str) -> dict[str, torch.Tensor]:
    """The tensors of a saved model, by the checkpoint's keys; those that are tied once."""
    import tempfile

    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder:
        _model(kind).save_pretrained(folder)
        return load_file(Path(folder) / "model.safetensors")


def _new(tensor: torch.Tensor) -> torch.Tensor:
    return torch.rand(tensor.shape, generator=torch.Generator().manual_seed(7)).to(tensor.dtype)


class Writer:
    """A folder that a layout writes itself into."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder = folder
        self.tensors: dict[str, Any] = dict(_saved(kind))
        model_type, _, sizes = _KINDS[kind]
        config = AutoConfig.for_model(model_type, **copy.deepcopy(sizes))
        config.architectures = [type(_model(kind)).__name__]
        config.save_pretrained(folder)

    def config(self, **changes: Any) -> None:
        path = self.folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    def file(self, name: str, tensors: Tensors, metadata: dict[str, str] | None = None) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: t.contiguous() for k, t in tensors.items()}, path, metadata)

    def whole(self, **changes: torch.Tensor | None) -> None:
        """One file; keys are given with ``__`` for dots, `None` takes one out."""
        for key, tensor in changes.items():
            self.tensors[key.replace("__", ".")] = tensor
        self.file("model.safetensors", {k: t for k, t in self.tensors.items() if t is not None}, {"format": "pt"})

    def halves(self) -> tuple[Tensors, Tensors]:
        keys = list(self.tensors)
        middle = len(keys) // 2
        return {k: self.tensors[k] for k in keys[:middle]}, {k: self.tensors[k] for k in keys[middle:]}

    def index(self, files: dict[str, Tensors], name: str = "model.safetensors.index.json", **changes: Any) -> None:
        for file, tensors in files.items():
            self.file(file, tensors, {"format": "pt"})
        weight_map = {key: file for file, tensors in files.items() for key in tensors}
        data = {"metadata": {"total_size": 1}, "weight_map": weight_map, **changes}
        (self.folder / name).write_text(json.dumps({k: v for k, v in data.items() if v is not None}))


def _sharded(w: Writer) -> None:
    one, two = w.halves()
    w.index({"model-00001-of-00002.safetensors": one, "model-00002-of-00002.safetensors": two})


def _single_beside_index(w: Writer) -> None:
    w.index({"model-00001-of-00001.safetensors": {k: _new(t) for k, t in w.tensors.items()}})
    w.whole()


def _index_beside_variant(w: Writer) -> None:
    w.file("model.fp16.safetensors", {k: _new(t) for k, t in w.tensors.items()})
    _sharded(w)


def _shards_in_folders(w: Writer) -> None:
    one, two = w.halves()
    w.index({"shards/a.safetensors": one, "more/shards/a.safetensors": two})


def _key_in_two_shards(w: Writer) -> None:
    one, two = w.halves()
    again = {k: _new(t) for k, t in list(one.items())[:3]}
    w.index({"a.safetensors": one, "b.safetensors": {**two, **again}})


def _index_that_lies(w: Writer) -> None:
    """All tensors of each file count, whatever the map says of them."""
    one, two = w.halves()
    w.index({"a.safetensors": one, "b.safetensors": two})
    w.index({}, weight_map={"nothing": "b.safetensors", "lm_head.weight": "a.safetensors"})


def _named_file(w: Writer) -> None:
    w.config(transformers_weights="own/best.safetensors")
    w.file("own/best.safetensors", w.tensors)
    w.file("model.safetensors", {k: _new(t) for k, t in w.tensors.items()})


def _named_index(w: Writer) -> None:
    one, two = w.halves()
    w.config(transformers_weights="best.safetensors.index.json")
    w.index({"x.safetensors": one, "y.safetensors": two}, name="best.safetensors.index.json")
    w.file("model.safetensors", {k: _new(t) for k, t in w.tensors.items()})


def _hub_cache(w: Writer) -> None:
    _sharded(w)
    blobs = w.folder.parent.parent / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(w.folder.iterdir())):
        file.rename(blobs / f"{number:040x}")
        file.symlink_to(Path("..") / ".." / "blobs" / f"{number:040x}")


def _own_head(w: Writer) -> None:
    w.config(tie_word_embeddings=True)
    w.whole()


def _head_of_zeros_and_signs(w: Writer) -> None:
    """Equal numbers, other bytes: a zero has two signs."""
    table = w.tensors["model.embed_tokens.weight"].clone()
    table[0] = 0.0
    w.whole(model__embed_tokens__weight=table, lm_head__weight=torch.where(table == 0, -table, table))


def _not_a_number_in_both(w: Writer) -> None:
    table = w.tensors["model.embed_tokens.weight"].clone()
    table[3, 2] = float("nan")
    w.whole(model__embed_tokens__weight=table, lm_head__weight=table.clone())


def _without_prefix(w: Writer) -> None:
    w.tensors = {k.removeprefix("model.").removeprefix("transformer."): t for k, t in w.tensors.items()}
    w.whole()


def _prefix(prefix: str) -> Callable[[Writer], None]:
    def write(w: Writer) -> None:
        w.tensors = {prefix + k: t for k, t in w.tensors.items()}
        w.whole()

    return write


def _with_and_without_prefix(w: Writer) -> None:
    """Two tensors for one parameter: one is taken, and always the same one."""
    w.whole(norm__weight=_new(w.tensors["model.norm.weight"]), layers__0__mlp__up_proj__weight=torch.ones(24, 16))


def _leftovers(w: Writer) -> None:
    w.whole(
        model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4),
        optimizer__step=torch.ones(1),
        model__layers__7__input_layernorm__weight=torch.ones(16),
    )


def _mixed_types(w: Writer) -> None:
    types = (torch.bfloat16, torch.float16, torch.float64, torch.float32)
    w.tensors = {k: t.to(types[i % 4]) for i, (k, t) in enumerate(w.tensors.items())}
    w.whole()


def _whole_numbers_and_small_floats(w: Writer) -> None:
    w.whole(
        model__norm__weight=torch.arange(16),
        model__layers__0__input_layernorm__weight=torch.arange(16).to(torch.uint8),
        model__layers__1__input_layernorm__weight=torch.rand(16).to(torch.float8_e4m3fn),
        model__layers__1__mlp__up_proj__weight=torch.rand(24, 16).to(torch.float8_e5m2),
    )


def _half_precision_configuration(w: Writer) -> None:
    w.config(dtype="bfloat16")
    w.whole()


def _scattered_experts(w: Writer) -> None:
    keys = sorted(w.tensors, key=lambda k: (hash(k[::-1]) % 5, k))
    w.index({f"{n}.safetensors": {k: w.tensors[k] for k in keys[n::3]} for n in range(3)})


def _stacked_experts(w: Writer) -> None:
    w.tensors = {k: t.clone() for k, t in _model("mixtral").state_dict().items()}
    w.whole()


def _experts_of_both_forms(w: Writer) -> None:
    w.tensors |= {k: _new(t) for k, t in _model("mixtral").state_dict().items() if "experts" in k}
    w.whole()


def _expert(number: int, value: torch.Tensor | None) -> Callable[[Writer], None]:
    def write(w: Writer) -> None:
        key = next(k for k in w.tensors if f"experts.{number}." in k)
        w.whole(**{key.replace(".", "__"): value})

    return write


def _old_norms(w: Writer) -> None:
    """Names of a norm's parameters as they were long ago."""
    w.tensors = {
        k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for k, t in w.tensors.items()
    }
    w.whole()


def _positions_beside(w: Writer) -> None:
    w.whole(bert__embeddings__position_ids=torch.arange(32)[None])


def _lacks(*endings: str) -> Callable[[Writer], None]:
    def write(w: Writer) -> None:
        w.tensors = {k: t for k, t in w.tensors.items() if not k.endswith(endings)}
        w.whole()

    return write


def _changed(key: str, tensor: torch.Tensor) -> Callable[[Writer], None]:
    return lambda w: w.whole(**{key.replace(".", "__"): tensor})


def _only_a_variant(w: Writer) -> None:
    w.file("model.fp16.safetensors", w.tensors)


def _folder_for_a_file(w: Writer) -> None:
    (w.folder / "model.safetensors").mkdir()
    _sharded(w)


def _no_file_metadata(w: Writer) -> None:
    w.file("model.safetensors", w.tensors)


LAYOUTS: dict[str, tuple[str, Callable[[Writer], None]]] = {
    "one file": ("llama", Writer.whole),
    "shards": ("llama", _sharded),
    "one file beside an older index": ("llama", _single_beside_index),
    "shards beside a variant": ("llama", _index_beside_variant),
    "shards in folders, of one name": ("llama", _shards_in_folders),
    "a key in two shards": ("llama", _key_in_two_shards),
    "an index that lies": ("llama", _index_that_lies),
    "a file named in config.json": ("llama", _named_file),
    "an index named in config.json": ("llama", _named_index),
    "links of the hub's cache": ("llama", _hub_cache),
    "a folder for a file, beside shards": ("llama", _folder_for_a_file),
    "a file without metadata": ("llama", _no_file_metadata),
    "tied, and a head of its own": ("llama", _own_head),
    "tied, one table": ("tied", Writer.whole),
    "tied, an equal head": ("tied", lambda w: w.whole(lm_head__weight=w.tensors["model.embed_tokens.weight"].clone())),
    "tied, a head of other bytes": ("tied", _head_of_zeros_and_signs),
    "tied, both not a number": ("tied", _not_a_number_in_both),
    "tied, a head that differs in type": (
        "tied",
        lambda w: w.whole(lm_head__weight=w.tensors["model.embed_tokens.weight"].bfloat16()),
    ),
    "tied, only the head": (
        "tied",
        lambda w: w.whole(lm_head__weight=w.tensors["model.embed_tokens.weight"], model__embed_tokens__weight=None),
    ),
    "tied by default, only the head": (
        "gpt2",
        lambda w: w.whole(lm_head__weight=w.tensors["transformer.wte.weight"], transformer__wte__weight=None),
    ),
    "tied by default, a head of its own": (
        "gpt2",
        lambda w: w.whole(lm_head__weight=_new(w.tensors["transformer.wte.weight"])),
    ),
    "tied, neither": ("tied", _lacks("embed_tokens.weight")),
    "untied, no head": ("llama", _lacks("lm_head.weight")),
    "untied by configuration, one table": (
        "tied",
        lambda w: (w.config(tie_word_embeddings=False), w.whole())[1],
    ),
    "no prefix": ("llama", _without_prefix),
    "no prefix, other names": ("gpt2", _without_prefix),
    "a prefix too much": ("llama-base", _prefix("model.")),
    "a prefix too much, of an encoder": ("bert-base", _prefix("bert.")),
    "a prefix of somebody else": ("llama", _prefix("module.")),
    "with and without prefix": ("llama", _with_and_without_prefix),
    "leftovers": ("llama", _leftovers),
    "mixed types": ("llama", _mixed_types),
    "whole numbers and small floats": ("llama", _whole_numbers_and_small_floats),
    "a configuration of half precision": ("llama", _half_precision_configuration),
    "experts one by one": ("mixtral", Writer.whole),
    "experts scattered over shards": ("mixtral", _scattered_experts),
    "experts stacked": ("mixtral", _stacked_experts),
    "experts of both forms": ("mixtral", _experts_of_both_forms),
    "an expert is missing": ("mixtral", _expert(3, None)),
    "an expert of another shape": ("mixtral", _expert(3, torch.ones(2, 3))),
    "a classifier": ("bert", Writer.whole),
    "a classifier without prefix": (
        "bert",
        lambda w: (setattr(w, "tensors", {k.removeprefix("bert."): t for k, t in w.tensors.items()}), w.whole())[1],
    ),
    "a classifier with old names": ("bert", _old_norms),
    "a classifier with positions": ("bert", _positions_beside),
    "a classifier without its head": ("bert", _lacks("classifier.weight", "classifier.bias")),
    "a classifier without its bias": ("bert", _lacks("classifier.bias")),
    "a classifier of other labels": ("bert", _changed("classifier.weight", torch.ones(5, 16))),
    "classes of tokens": ("bert-tokens", Writer.whole),
    "a decoder's classifier": ("llama-classes", Writer.whole),
    "an encoder without pooler": ("bert-base", _lacks("pooler.dense.weight", "pooler.dense.bias")),
    "an encoder's shared table": ("t5", Writer.whole),
    "an encoder's own table": (
        "t5",
        lambda w: w.whole(encoder__embed_tokens__weight=w.tensors["shared.weight"], shared__weight=None),
    ),
    "an encoder's two tables": (
        "t5",
        lambda w: w.whole(encoder__embed_tokens__weight=_new(w.tensors["shared.weight"])),
    ),
    "a tensor of nothing": ("llama", _changed("nothing", torch.ones(0, 4))),
    "a table of no columns": (
        "llama",
        lambda w: (
            w.config(intermediate_size=0),
            w.tensors.update(
                {k: torch.ones([0 if n == 24 else n for n in t.shape]) for k, t in w.tensors.items() if "mlp" in k}
            ),
            w.whole(),
        )[-1],
    ),
    "a tensor is missing": ("llama", _lacks("model.layers.1.mlp.up_proj.weight")),
    "a tensor of another shape": ("llama", _changed("model.norm.weight", torch.ones(15))),
    "a scalar for a vector": ("llama", _changed("model.norm.weight", torch.tensor(1.0))),
    "only a variant": ("llama", _only_a_variant),
    "an index of a missing file": ("llama", lambda w: w.index({}, weight_map={"a": "b.safetensors"})),
    "an index without metadata": ("llama", lambda w: w.index({"a.safetensors": w.tensors}, metadata=None)),
    "an index of nothing": ("llama", lambda w: w.index({}, weight_map={})),
    "named weights that are missing": (
        "llama",
        lambda w: (w.config(transformers_weights="no.safetensors"), w.whole())[1],
    ),
    "named weights of another form": (
        "llama",
        lambda w: (w.config(transformers_weights="pytorch_model.bin"), w.whole())[1],
    ),
}


def _theirs(folder: Path, auto: str) -> tuple[PreTrainedModel, set[str]] | None:
    try:
        model, info = getattr(transformers, auto).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    except Exception:  # transformers raises whatever its loaders raise
        return None
    return model, set(info["missing_keys"])


@pytest.mark.parametrize("name", LAYOUTS)
def test_both_load_the_same_or_refuse(name: str, tmp_path: Path) -> None:
    kind, write = LAYOUTS[name]
    folder = tmp_path / "snapshots" / "0"
    folder.mkdir(parents=True)
    write(Writer(folder, kind))
    auto = _KINDS[kind][1]
    partial = auto in _TASKS
    theirs = _theirs(folder, auto)
    if theirs is None or (theirs[1] and not partial):  # what would be left to chance is refused
        with pytest.raises(QeffError) as error:
            open_source(folder).lower() if not partial else _forward(folder, auto).lower()
        assert "\n" not in str(error.value)
        return
    model, missing = theirs
    ours = _forward(folder, auto).weights() if partial else open_source(folder).weights()
    assert set(ours) == set(model.state_dict()) - missing
    for key in ours:
        np.testing.assert_array_equal(ours[key].numpy(), model.state_dict()[key].numpy(), err_msg=key)
    if "classifier.weight" in missing:
        with pytest.raises(ModelLoadError, match=r"the checkpoint has no tensor 'classifier\."):
            _forward(folder, auto).lower()


def _forward(folder: Path, auto: str) -> ForwardSource:
    return ForwardSource(Folder(folder), ForwardOptions(_TASKS[auto]))


def test_a_head_of_its_own_is_lowered(tmp_path: Path) -> None:
    """What is untied by the checkpoint is two weights in the graph, each with its own numbers."""
    _own_head(Writer(tmp_path, "llama"))
    values = open_source(tmp_path).lower().graph.initializers.values()
    tables = {
        v.metadata_props[WEIGHT_KEY]: v for v in values if WEIGHT_KEY in v.metadata_props and 40 in (v.shape or ())
    }
    assert set(tables) == {"model.embed_tokens.weight", "lm_head.weight"}
    for name, value in tables.items():
        assert value.const_value is not None
        np.testing.assert_array_equal(value.const_value.numpy(), _saved("llama")[name].numpy())


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (
            lambda w: (w.folder / "pytorch_model.bin").write_bytes(b""),
            "has no model.safetensors (only pytorch_model.bin)",
        ),
        (lambda w: w.index({}, weight_map={"a": "/etc/x.safetensors"}), "a file outside the model folder: refused"),
        (lambda w: w.index({}, weight_map={"a": "x/../../y.safetensors"}), "a file outside the model folder: refused"),
        (lambda w: w.index({}, weight_map={"a": "b.bin"}), "names 'b.bin', which is not a safetensors file"),
        (lambda w: w.index({}, weight_map={"a": ["b.safetensors"]}), "which is not a safetensors file"),
        (lambda w: w.index({}, weight_map={"a": "n" * 300 + ".safetensors"}), "File name too long"),
        (lambda w: w.config(transformers_weights="../x.safetensors"), "is missing"),
        (lambda w: w.config(transformers_weights=["x.safetensors"]), "neither a safetensors file nor an index"),
        (lambda w: os.mkfifo(w.folder / "model.safetensors"), "is not a regular file: refused"),
        (lambda w: os.mkfifo(w.folder / "model.safetensors.index.json"), "is not a regular file: refused"),
        (lambda w: (w.folder / "model.safetensors").symlink_to("/dev/zero"), "outside of"),
        (lambda w: (w.folder / "model.safetensors").symlink_to("nowhere"), "cannot be read (No such file"),
        (
            lambda w: w.file("shard-00001-model-00001-of-00002.safetensors", w.tensors),
            "is a checkpoint of a distributed training run",
        ),
    ],
)
def test_what_transformers_might_read_is_refused_by_a_sentence(
    write: Callable[[Writer], None], message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    write(Writer(folder, "llama"))
    with pytest.raises(ModelLoadError) as error:
        open_source(folder)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_tables_that_nobody_saves_are_computed(tmp_path: Path) -> None:
    """Positions of a translation model: transformers leaves them out when it saves, and computes them when it loads."""
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    config = AutoConfig.for_model("marian", vocab_size=40, pad_token_id=39, max_position_embeddings=32, **sizes)
    transformers.AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path)
    source = ForwardSource(provider := Folder(tmp_path), ForwardOptions(EMBEDDING))
    name = "encoder.embed_positions.weight"
    assert not any("embed_positions" in key for key in provider.checkpoint.entries)
    expected = transformers.AutoModel.from_pretrained(tmp_path, dtype=torch.float32).state_dict()[name]
    state = torch.random.get_rng_state()
    found = source.weights()[name].numpy()
    np.testing.assert_array_equal(found, expected.numpy())
    assert found.std() > 0.1
    assert torch.equal(torch.random.get_rng_state(), state)  # nobody's chance is used up


def test_two_tensors_are_compared_up_to_the_first_difference(tmp_path: Path) -> None:
    """Pieces that lie behind the first difference are not read: they are not even there."""
    import onnx_ir as ir

    size = 3 << 20
    data = np.zeros(size, np.float32)
    data[5] = 1.0
    (tmp_path / "a").write_bytes(data.tobytes())
    (tmp_path / "b").write_bytes(np.zeros(size, np.float32).tobytes())

    def tensor(name: str, length: int = size) -> ir.TensorProtocol:
        return FileRange(tmp_path / name, 0, 4 * length, ir.DataType.FLOAT, (length,)).tensor("x")

    assert same_numbers(tensor("a"), tensor("a"))
    assert not same_numbers(tensor("a"), tensor("b"))
    assert not same_numbers(tensor("b"), tensor("b", 5))
    (tmp_path / "c").write_bytes((tmp_path / "b").read_bytes())
    assert same_numbers(tensor("b"), tensor("c"))
    data[5], data[-1] = 0.0, 1.0
    (tmp_path / "c").write_bytes(data.tobytes())
    assert not same_numbers(tensor("b"), tensor("c"))  # in the last piece
