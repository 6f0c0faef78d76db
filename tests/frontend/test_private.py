"""Tells when a private or young API of transformers or torch, which the frontend wraps, moves."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import _symbolic_trace
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers import AutoConfig, AutoModel, PreTrainedModel, cache_utils, conversion_mapping, core_model_loading
from transformers.exporters import exporter_dynamo, exporter_onnx
from transformers.exporters import utils as exporter_utils
from transformers.exporters.utils import _PATCHES, import_dotted_path
from transformers.generation.utils import GenerationMixin
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from qeff_ir.frontend import private
from qeff_ir.frontend.capture import recurrences
from qeff_ir.frontend.gguf import transformers_reading as gguf_reading
from tests import support

MIXIN: Any = GenerationMixin  # its methods are typed for models that generate, not for itself


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (exporter_utils.apply_fx_node_fixes, ["backend", "graph_module"]),
        (exporter_onnx.apply_onnx_ir_fixes, ["onnx_program"]),
        (exporter_dynamo.reset_model_state, ["model"]),
        (conversion_mapping.get_model_conversion_mapping, ["model"]),
        (
            core_model_loading.rename_source_key,
            ["source_key", "weight_renamings", "weight_converters", "base_model_prefix", "meta_state_dict"],
        ),
        (
            core_model_loading.WeightConverter.add_tensor,
            ["self", "target_key", "source_key", "source_pattern"],
        ),
        (core_model_loading.dot_natural_key, ["s"]),
        (core_model_loading.WeightConverter.convert, ["self", "layer_name"]),
        (gguf_reading.get_gguf_config, ["metadata", "tensor_names"]),
        (gguf_reading.get_gguf_conversion_mapping, ["gguf_arch", "config"]),
        (gguf_reading.is_gguf_arch_supported, ["gguf_arch"]),
        (gguf_reading.read_gguf_metadata, ["gguf_path"]),
        (gguf_reading.load_gguf_checkpoint, ["gguf_checkpoint_path", "return_tensors"]),
        (gguf_reading.get_gguf_hf_weights_map, ["hf_model", "processor"]),
        (gguf_reading.TensorProcessor.process, ["self", "weights", "name"]),
        (AttentionInterface.register, ["key", "value"]),
        (AttentionMaskInterface.register, ["key", "value"]),
        (_symbolic_trace._Patcher.patch_method, ["self", "cls", "name", "new_fn"]),
        (cache_utils.Cache.get_mask_sizes, ["self", "query_length", "layer_idx"]),
        (cache_utils.DynamicLayer.update, ["self", "key_states", "value_states"]),
        (PreTrainedModel.set_attn_implementation, ["self", "attn_implementation"]),
        (PreTrainedModel.set_experts_implementation, ["self", "experts_implementation"]),
        (PreTrainedModel.get_experts_implementation, ["self"]),
        (MIXIN.prepare_inputs_for_generation, ["self", "input_ids"]),
        (MIXIN._optimize_model_for_decode, ["self"]),
        (MIXIN._supports_default_dynamic_cache, []),
    ],
    ids=lambda v: getattr(v, "__qualname__", ""),
)
def test_signatures_begin_as_expected(function: Callable[..., Any], expected: list[str]) -> None:
    assert list(inspect.signature(function).parameters)[: len(expected)] == expected


def test_the_onnx_translation_table_maps_torch_operators() -> None:
    table = private.onnx_translations()
    assert len(table) > 0
    assert all(callable(v) or isinstance(v, list | tuple) for v in table.values())


def test_functions_are_registered_for_this_thread_and_this_block() -> None:
    def seen() -> list[Any]:
        return [r.get(name) for r in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS) for name in ("sdpa", "us")]

    def ours() -> None: ...

    before, mappings = seen(), [i._global_mapping for i in (AttentionInterface, AttentionMaskInterface)]
    with contextlib.suppress(KeyError), private.registered({"us": ours}, {"us": ours, "sdpa": ours}):
        assert seen() == [before[0], ours, ours, ours]
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(seen).result() == before
            with pytest.raises(KeyError):
                pool.submit(lambda: ALL_MASK_ATTENTION_FUNCTIONS["us"]).result()
            pool.submit(AttentionInterface.register, "of another", ours).result()
            pool.submit(AttentionMaskInterface.register, "of another", ours).result()
        raise KeyError
    assert seen() == before
    for interface, mapping in zip((AttentionInterface, AttentionMaskInterface), mappings, strict=True):
        assert interface._global_mapping is mapping and mapping.pop("of another") is ours and "us" not in mapping


def test_export_patches_are_of_this_thread_and_leave_nothing() -> None:
    owners = [import_dotted_path(path, missing_ok=True) for patches in _PATCHES.values() for path, *_ in patches]
    owners = [*filter(None, owners), torch.compiler, torch.onnx, torch.nn.Module, _symbolic_trace._Patcher]
    before = [dict(vars(owner)) for owner in owners]
    mixed = torch.ones(2), torch.ones(2, dtype=torch.int64)
    with contextlib.suppress(KeyboardInterrupt), private.export_patches():
        assert torch.full((1,), 1).dtype == torch.int64 and torch.roll is not vars(torch)["randperm"]
        with ThreadPoolExecutor(1) as pool:
            for owner, was in zip(owners, before, strict=True):
                now = {n: v for n, v in vars(owner).items() if v is not was.get(n)}
                assert all(v.__code__.co_name == "choose" for v in now.values()), now
            assert pool.submit(torch.where, torch.tensor([True, False]), *mixed).result().dtype == torch.float32
            assert not pool.submit(torch.compiler.is_exporting).result()
        raise KeyboardInterrupt
    assert [dict(vars(owner)) for owner in owners] == before


@pytest.mark.parametrize(
    ("name", "interface", "experts"), [("llama", True, False), ("bloom", False, False), ("mixtral", True, True)]
)
def test_models_tell_how_they_attend_and_route(name: str, interface: bool, experts: bool) -> None:
    model = support.tiny(name)[1]
    assert private.supports_attention_interface(model) == interface
    assert private.has_experts(model) == experts
    assert private.attention_implementations(model.config)[""] in ("sdpa", "eager")


def test_modules_keep_their_tensors_in_tables() -> None:
    module: Any = torch.nn.Module()
    module.register_parameter("p", torch.nn.Parameter(torch.zeros(1)))
    module.register_buffer("kept", torch.zeros(1))
    module.register_buffer("computed", torch.zeros(1), persistent=False)
    parameters, buffers = private.tensor_tables(module)
    assert (set(parameters), set(buffers)) == ({"p"}, {"kept", "computed"})
    assert private.computed_buffers(module) == {"computed"}
    buffers["kept"] = torch.ones(1)
    assert module.kept.item() == 1.0


def test_a_parameter_that_is_marked_is_not_initialized_again() -> None:
    config, _ = support.tiny("llama")
    model = type(support.tiny("llama")[1])(config)
    for parameter in model.parameters():
        parameter.data.fill_(7.0)
        private.mark_initialized(parameter, True)
    for module in model.modules():
        private.mark_initialized(module, False)
    model.initialize_weights()
    assert all((p == 7.0).all() for p in model.parameters())


def test_fake_tensors_hold_no_data() -> None:
    with FakeTensorMode():
        fake = torch.empty(1 << 40)
    assert isinstance(fake, FakeTensor) and fake.shape == (1 << 40,)


def test_fake_tensors_are_made_again() -> None:
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        fake = torch.empty(2, 3, 4, dtype=torch.float16).transpose(1, 2)
        whole = torch.empty(2, 3)
        none = [torch.tensor(5), torch.empty(2, dtype=torch.complex64), torch.nonzero(torch.ones(3)), 5]
    spec = private.FakeSpec.of(fake)
    assert spec is not None and all(private.FakeSpec.of(n) is None for n in (torch.zeros(2), *none))
    new = private.FakeSpec.new(mode, whole.shape, whole.dtype)
    for made, like in ((spec.fake(), fake), (new.fake(), whole)):
        assert made is not like and type(made) is FakeTensor and made.fake_mode is mode
        assert all(getattr(made, a) == getattr(like, a) for a in ("shape", "dtype", "device", "layout"))
        assert made.stride() == like.stride()


def test_cache_layers_are_told_by_their_class() -> None:
    config, _ = support.tiny("gemma2")
    kinds = [type(layer) for layer in cache_utils.DynamicCache(config=config).layers]
    assert kinds == [cache_utils.DynamicSlidingWindowLayer, cache_utils.DynamicLayer]


def test_operators_tell_whether_they_write_into_an_argument() -> None:
    assert private.changes_arguments(torch.ops.aten.add_.Tensor)
    assert not private.changes_arguments(torch.ops.aten.add.Tensor)


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("mamba", "mamba_selective_scan"),
        ("mamba2", "mamba2_chunk_scan"),
        ("qwen3_next", "torch_chunk_gated_delta_rule"),
        ("kimi_linear", "chunk_kimi_delta_attention"),
    ],
)
def test_kernels_have_the_names_and_arguments_that_ours_stand_for(model_type: str, name: str) -> None:
    code = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    made = [make for pattern, make in recurrences.KERNELS.items() if re.fullmatch(pattern, name)]
    assert len(made) == 1
    ours = inspect.signature(made[0](lambda: None)).parameters
    required = [p.name for p in inspect.signature(getattr(code, name)).parameters.values() if p.default is p.empty]
    assert set(required) <= set(ours)


def test_an_auto_class_says_which_configurations_it_loads() -> None:
    from transformers import AutoModelForCausalLM, CLIPConfig, LlamaConfig

    assert private.loads(AutoModelForCausalLM, LlamaConfig())
    assert not private.loads(AutoModelForCausalLM, CLIPConfig())


def test_a_model_says_which_weights_no_checkpoint_needs_to_have() -> None:
    with torch.device("meta"):
        sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 40, "pad_token_id": 39}
        config = AutoConfig.for_model("marian", **sizes)
        assert "model.encoder.embed_positions.weight" in private.ignored_when_missing(AutoModel.from_config(config))
