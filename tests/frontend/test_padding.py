"""What a fixed length does to a model: padding that it does not see is added, any other is refused; outputs are cut."""

from __future__ import annotations

import copy
import functools
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from qeff_ir import QEFFAutoModel, QEFFAutoModelForCTC, QEFFAutoModelForSequenceClassification, numerics
from qeff_ir.errors import CompileError, RuntimeInputError
from qeff_ir.frontend.export.padding import find_padding
from qeff_ir.frontend.forward_source import ForwardOptions, ForwardSource
from qeff_ir.frontend.inputs import find_inputs
from qeff_ir.frontend.providers.memory import Memory
from qeff_ir.frontend.tasks import CTC
from qeff_ir.runtime.sizes import evaluate
from tests.encoders import build, example

TARGETS = ["onnxruntime", "ai100"]
SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
IDS = np.array([[5, 6, 7, 8, 9, 10], [11, 12, 13, 63, 63, 63]])
LEFT = np.array([[5, 6, 7, 8, 9, 10], [63, 63, 63, 11, 12, 13]])


@functools.cache
def classifier(kind: str, pad: int | None, eos: int | None = None) -> Any:
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=80, num_labels=2, pad_token_id=pad, eos_token_id=eos, bos_token_id=None, **SMALL
    )
    torch.manual_seed(0)
    return transformers.AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()


@functools.cache
def double(model: Any) -> Any:
    return copy.deepcopy(model).double()


def exact(model: Any, **inputs: Any) -> Any:
    """What transformers makes of the inputs in float64."""
    tensors = {k: torch.as_tensor(v) for k, v in inputs.items()}
    with torch.no_grad():
        return double(model)(**{k: v.double() if v.is_floating_point() else v for k, v in tensors.items()})


def logits(model: Any, ids: Any, mask: Any) -> Any:
    return exact(model, input_ids=ids, attention_mask=mask).logits.numpy()


def close(found: Any, expected: Any, depth: int = 9) -> bool:
    return numerics.error_over_rms(found, expected) <= numerics.bound(depth)


@pytest.mark.parametrize(("kind", "eos"), [("qwen2", None), ("gemma", 63)])
def test_rows_of_a_decoders_classifier_are_filled_with_its_pad_token(kind: str, eos: int | None) -> None:
    theirs = classifier(kind, 63, eos)
    ours = QEFFAutoModelForSequenceClassification(theirs)
    ours.compile(target="ai100", seq_len=[8, 16], batch_size=2, emit_only=True)
    for ids in (IDS, LEFT, IDS[:1], np.tile(IDS[:1], (1, 2))):
        mask = (ids != 63).astype(np.int64)
        assert close(ours.generate(input_ids=ids, attention_mask=mask)["logits"], logits(theirs, ids, mask))
    other = logits(theirs, np.pad(IDS[:1], [(0, 0), (0, 2)]), np.array([[1] * 6 + [0] * 2]))
    assert not close(other, logits(theirs, IDS[:1], np.ones_like(IDS[:1])))  # zeros would be read


@pytest.mark.parametrize("target", TARGETS)
def test_a_classifier_without_a_pad_token_takes_one_row_of_a_compiled_length(target: str) -> None:
    theirs = classifier("qwen2", None)
    ours = QEFFAutoModelForSequenceClassification(theirs)
    ours.compile(target=target, seq_len=[6, 16], emit_only=True)
    mask = np.ones_like(IDS[:1])
    assert close(ours.generate(input_ids=IDS[:1], attention_mask=mask)["logits"], logits(theirs, IDS[:1], mask))
    with pytest.raises(RuntimeInputError, match="the inputs have 2 rows, the model takes one at a time"):
        ours.generate(input_ids=IDS)
    if target == "ai100":
        with pytest.raises(RuntimeInputError) as error:
            ours.generate(input_ids=IDS[:1, :5])
        assert str(error.value) == (
            "the inputs have 5 tokens, and filling them up to 6 would change 'logits' of this model: give 6 or 16, or "
            "compile with seq_len=5"
        )
    with pytest.raises(CompileError, match="batch_size=2 is more than the one row that Qwen2ForSeq"):
        ours.compile(target=target, seq_len=6, batch_size=2, emit_only=True)


def test_without_a_mask_padding_counts_as_text() -> None:
    model = QEFFAutoModel(build("bert"), inputs=["input_ids"], pooling="mean")
    model.compile(target="ai100", seq_len=8, emit_only=True)
    with pytest.raises(RuntimeInputError, match="filling them up to 8 would change 'output' of this model"):
        model.generate(input_ids=[[5, 6, 7]])
    causal = QEFFAutoModel(build("qwen3"), inputs=["input_ids"], pooling="mean")  # its tokens see none behind them
    causal.compile(target="ai100", seq_len=8, emit_only=True)
    with pytest.raises(RuntimeInputError, match="filling them up to 8 would change 'output' of this model"):
        causal.generate(input_ids=[[5, 6, 7]])


def test_a_pooling_of_the_users_that_does_not_read_the_mask_is_not_padded() -> None:
    model = QEFFAutoModel(build("bert"), pooling=lambda hidden, mask: hidden.mean(1) + 0 * mask.sum(1, keepdim=True))
    model.compile(target="ai100", seq_len=8, emit_only=True)
    with pytest.raises(RuntimeInputError, match="filling them up to 8 would change 'output'"):
        model.generate(input_ids=[[5, 6, 7]])


@functools.cache
def speech(norm: str) -> Any:
    config = transformers.AutoConfig.for_model(
        "wav2vec2", vocab_size=20, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        conv_dim=(16, 16), conv_kernel=(10, 3), conv_stride=(5, 2), num_feat_extract_layers=2, feat_extract_norm=norm,
        do_stable_layer_norm=norm == "layer", conv_bias=True, num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.AutoModelForCTC.from_config(config, dtype=torch.float32).eval()


class Letters:
    """A processor without its special cases: one letter for each frame."""

    def batch_decode(self, ids: Any) -> list[str]:
        return ["".join(chr(97 + int(i)) for i in row) for row in ids]


SOUND = np.random.default_rng(0).standard_normal((3, 700)).astype(np.float32)


@pytest.mark.parametrize("target", TARGETS)
def test_padding_of_a_recording_is_not_transcribed(target: str) -> None:
    theirs = speech("layer")
    ours = QEFFAutoModelForCTC(theirs)
    ours.compile(target=target, seq_len=[720, 1000], batch_size=2, emit_only=True)
    expected, short = (exact(theirs, input_values=sound).logits for sound in (SOUND, SOUND[1:2, :433]))
    found = ours.generate(input_values=SOUND)["logits"]
    assert found.shape == tuple(expected.shape) and close(found, expected.numpy())
    assert ours.transcribe(Letters(), input_values=SOUND) == Letters().batch_decode(expected.argmax(-1))
    mask = np.ones_like(SOUND, dtype=np.int64)
    mask[1, 433:] = 0
    padded = np.where(mask == 1, SOUND, 0).astype(np.float32)
    texts = ours.transcribe(Letters(), input_values=padded, attention_mask=mask)
    assert texts[1:2] == Letters().batch_decode(short.argmax(-1))
    assert len(texts[1]) < len(texts[0]) == expected.shape[1]


def test_a_recording_that_is_normalized_as_a_whole_is_not_padded() -> None:
    theirs = speech("group")
    ours = QEFFAutoModelForCTC(theirs)
    ours.compile(target="ai100", seq_len=[700, 1000], emit_only=True)
    expected = exact(theirs, input_values=SOUND).logits.numpy()
    depth = numerics.depth(ForwardSource(Memory(theirs), ForwardOptions(CTC)).lower())  # deeper: it normalizes twice
    assert close(ours.generate(input_values=SOUND)["logits"], expected, depth)
    with pytest.raises(RuntimeInputError, match="filling them up to 1000 would change 'logits' of this model"):
        ours.generate(input_values=np.zeros((1, 701), np.float32))


@pytest.mark.parametrize("target", TARGETS)
def test_an_output_may_have_its_rows_behind_its_tokens(target: str) -> None:
    config = transformers.XLNetConfig(vocab_size=90, d_model=32, n_layer=1, n_head=4, d_inner=64)
    torch.manual_seed(0)
    theirs = transformers.AutoModel.from_config(config, dtype=torch.float32).eval()
    ours = QEFFAutoModel(theirs, pooling="none" if target == "ai100" else None)
    ours.compile(target=target, seq_len=[4, 8], batch_size=4, emit_only=True)
    ids = np.arange(6, 6 + 15).reshape(5, 3)  # more rows than a run has
    expected = exact(theirs, input_ids=ids)
    found = ours.generate(input_ids=ids)
    if target == "onnxruntime":
        assert found["last_hidden_state"].shape == (5, 3, 32) and found["mems.0"].shape == (3, 5, 32)
        assert close(found["last_hidden_state"], expected.last_hidden_state.numpy())
    else:
        assert found["output"].shape == (5, 3, 32)


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (transformers.Qwen2Config(vocab_size=64, pad_token_id=63, **SMALL), 64),
        (transformers.BertConfig(vocab_size=64, pad_token_id=9, **SMALL), 64),
        (transformers.RobertaConfig(vocab_size=64, pad_token_id=9, **SMALL), 54),
        (transformers.OPTConfig(vocab_size=66, hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=4,
                                max_position_embeddings=64, word_embed_proj_dim=32), 64),
    ],
    ids=["qwen2", "bert", "roberta", "opt"],
)  # fmt: skip
def test_the_table_of_positions_is_told_by_what_it_is_asked(config: Any, limit: int) -> None:
    """The vocabulary is as large as the positions, and a token in its middle pads."""
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config, dtype=torch.float32).eval()
    module = ForwardSource(Memory(model), ForwardOptions()).lower()
    assert module.dims["seq_len"].maximum == limit


def test_sizes_that_equal_others_are_kept_apart(tmp_path: Any) -> None:
    """As many rows as tokens, features and classes."""
    config = transformers.BertConfig(**dict[str, Any](SMALL, hidden_size=8, num_attention_heads=2), vocab_size=64)
    torch.manual_seed(0)
    theirs = transformers.AutoModel.from_config(config, dtype=torch.float32).eval()
    ours = QEFFAutoModel(theirs)
    ours.compile(target="ai100", seq_len=8, batch_size=8, emit_only=True)
    ids = np.arange(2 * 3).reshape(2, 3) + 5
    expected = exact(theirs, input_ids=ids).last_hidden_state.numpy()
    found = ours.generate(input_ids=ids)["output"]
    assert found.shape == (2, 3, 8) and close(found, expected)


def test_a_token_that_ends_a_text_is_not_taken_for_padding() -> None:
    """CLIP reads its text at the first end token: where it pads too, another one fills rows of a text without it."""
    config = transformers.CLIPTextConfig(
        **{k: v for k, v in SMALL.items() if k not in ("num_key_value_heads", "head_dim")},
        vocab_size=80, eos_token_id=63, pad_token_id=63, bos_token_id=62,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.AutoModel.from_config(config, dtype=torch.float32).eval()
    found = find_padding(theirs, find_inputs(theirs))
    assert found.sound == {"last_hidden_state", "pooler_output"} and found.fill == 0


def test_the_mask_of_a_recording_is_compiled_in_where_it_helps() -> None:
    for norm, names in (("layer", ["input_values", "attention_mask"]), ("group", ["input_values"])):
        module = ForwardSource(Memory(speech(norm)), ForwardOptions(CTC)).lower()
        assert [value.name for value in module.graph.inputs] == names
    shapes = {"input_features": ("batch_size", "seq_len", 16)}
    features = example("wav2vec2-bert", shapes)["input_features"].numpy()
    ours = QEFFAutoModel(build("wav2vec2-bert"))
    ours.compile(target="ai100", seq_len=40, emit_only=True)
    expected = exact(build("wav2vec2-bert"), input_features=features).last_hidden_state.numpy()
    assert close(ours.generate(input_features=features)["last_hidden_state"], expected)


def test_sizes_are_evaluated_and_nothing_else_is() -> None:
    assert evaluate("((seq_len//5) - 5)//3 + 1", {"seq_len": 401}) == 26
    assert evaluate("Max(1, -seq_len % 4)", {"seq_len": 7}) == 1
    for text in ("x", "seq_len.real", "__import__('os')", "1/0", "seq_len//0", "(", "1.5", "'a'*3", "2**9", "-" * 9000):
        with pytest.raises(ValueError, match="is not a size"):
            evaluate(text, {"seq_len": 7})
