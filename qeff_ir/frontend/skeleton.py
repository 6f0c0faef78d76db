"""Models without weights: built from a configuration, with only the computed buffers real."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from qeff_ir.frontend import private


def build_skeleton(
    config: PreTrainedConfig, *, trust_remote_code: bool = False, auto: Any = AutoModelForCausalLM
) -> PreTrainedModel:
    """The model that one of transformers' auto classes makes of a configuration: float32, on the meta device.

    Buffers that a checkpoint does not hold (rotary frequencies, say) are computed as transformers computes them after
    loading.
    """
    with torch.device("meta"):
        model = auto.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    for parameter in model.state_dict(keep_vars=True).values():
        private.mark_initialized(parameter, True)
    for module in model.modules():
        private.mark_initialized(module, False)
        _, buffers = private.tensor_tables(module)
        for name in private.computed_buffers(module):
            buffer = buffers[name]
            if buffer is not None and buffer.is_meta:
                buffers[name] = torch.empty_like(buffer, device="cpu")
    model.initialize_weights()
    return model.eval()


@contextlib.contextmanager
def fake_weights(model: PreTrainedModel) -> Generator[FakeTensorMode]:
    """Replace parameters (and buffers on the meta device) by fake float32 ones for as long as the block lasts.

    Tied parameters stay tied. Yields the fake mode, for making inputs in.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    fakes: dict[int, torch.Tensor] = {}
    molds: dict[tuple[torch.Size, torch.dtype], private.FakeMold] = {}
    saved: list[tuple[dict[str, torch.Tensor | None], str, torch.Tensor]] = []
    try:
        for module in model.modules():
            for table, is_buffer in zip(private.tensor_tables(module), (False, True), strict=True):
                for name, tensor in list(table.items()):
                    half = tensor is not None and tensor.dtype in (torch.float16, torch.bfloat16)
                    if tensor is None or (is_buffer and not tensor.is_meta and not half):
                        continue
                    saved.append((table, name, tensor))
                    if is_buffer and not tensor.is_meta:
                        table[name] = tensor.float()
                        continue
                    if id(tensor) not in fakes:
                        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
                        form = (tensor.shape, dtype)
                        if form not in molds:
                            molds[form] = private.FakeMold.new(mode, *form)
                        fake = molds[form].fake()
                        fakes[id(tensor)] = fake if is_buffer else torch.nn.Parameter(fake, requires_grad=False)
                    table[name] = fakes[id(tensor)]
        yield mode
    finally:
        for table, name, tensor in saved:
            table[name] = tensor
