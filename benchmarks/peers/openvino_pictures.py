"""OpenVINO for pictures and text: the encoder by its own converter, the decoder by transformers' exporter."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.exporters.configs import OpenVINOConfig

from benchmarks.peers.exported import export
from benchmarks.peers.openvino_export import EXACT
from benchmarks.peers.silence import silence


class OpenVinoPictures:
    """An encoder, a table of embeddings on the host, and a stateful decoder of vectors, put together here.

    Args:
        model: The model.
        given: A question, with ``pixel_values`` and ``image_sizes`` as all others have them.
        threads: Threads of both compiled models.
    """

    def __init__(self, model: PreTrainedModel, given: dict[str, Any], threads: int) -> None:
        openvino: Any = importlib.import_module("openvino")
        config, whole = {"INFERENCE_NUM_THREADS": threads, **EXACT}, model.base_model
        with silence(), warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")  # what torch says of its own pytrees
            encoder = _Encoder(whole, given["image_sizes"].tolist())
            program = torch.export.export(encoder, (given["pixel_values"],), strict=False)
            found = openvino.convert_model(program)
        self._encoder = openvino.Core().compile_model(found, "CPU", config).create_infer_request()
        self._table, self._image = model.get_input_embeddings(), model.config.image_token_id
        exported = export(_decoder(model), OpenVINOConfig(), batch=1, vectors=True)
        exported.to("cpu", config=config)
        runner: Any = exported.runners["model"]
        self._decoder = runner.request
        self._ports = {name for port in runner.compiled_model.inputs for name in port.names}

    def encode(self, given: dict[str, Any]) -> torch.Tensor:
        """Rows of the picture of a question, ``[rows, width]``."""
        return torch.from_numpy(self._encoder.infer([given["pixel_values"].numpy()], share_inputs=True)[0].copy())

    def answer(self, given: dict[str, Any]) -> torch.Tensor:
        """Question and answer, ``[1, tokens]``, greedy; each new token is told to ``streamer``."""
        ids, told = given["input_ids"], given["streamer"]
        told.put(ids)
        with torch.inference_mode():
            vectors = self._table(ids)
            vectors[ids == self._image] = self.encode(given)
            self._decoder.reset_state()
            start, found = 0, ids
            for _ in range(given["max_new_tokens"]):
                token = torch.tensor([[self._run(vectors, start)]])
                told.put(token)
                start, found, vectors = found.shape[1], torch.cat([found, token], dim=1), self._table(token)
        return found

    def _run(self, vectors: torch.Tensor, start: int) -> int:
        """The next token after vectors ``[1, tokens, width]``, of which `start` tokens are in the cache."""
        places = np.arange(start, start + vectors.shape[1])[None]
        feed = {"inputs_embeds": vectors.numpy(), "position_ids": places, "beam_idx": np.zeros(1, np.int32)}
        feed["logits_to_keep"] = np.asarray(1)
        out = self._decoder.infer({n: v for n, v in feed.items() if n in self._ports}, share_inputs=True)
        return int(out["logits"][0, -1].argmax())


class _Encoder(torch.nn.Module):
    """Rows of one picture, whose size is known."""

    def __init__(self, model: Any, sizes: list[list[int]]) -> None:
        super().__init__()
        self.model, self.sizes = model, sizes

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model.get_image_features(pixels, self.sizes).pooler_output[0]


def _decoder(model: Any) -> PreTrainedModel:
    """The language model as one of text alone, with the same weights."""
    with torch.device("meta"):
        text = AutoModelForCausalLM.from_config(model.config.get_text_config())
    setattr(text, text.base_model_prefix, model.get_decoder())
    text.set_output_embeddings(model.get_output_embeddings())
    return text.eval()
