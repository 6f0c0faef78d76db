"""``/v1/embeddings``: one vector of each text."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from qeff_ir.auto.embedding import QEFFAutoModel
from qeff_ir.serve.errors import ApiError
from qeff_ir.serve.schema import EmbeddingRequest


def embed(model: QEFFAutoModel, request: EmbeddingRequest) -> dict[str, Any]:
    """The answer to a request; takes as long as the model takes.

    Raises:
        ApiError: Another number of features is asked for than the model has.
        RuntimeInputError: A text has no token, or is too long.
    """
    vectors = model.encode(request.input, show_progress=False)
    if request.dimensions not in (None, vectors.shape[1]):
        raise ApiError(
            400, f"embeddings of this model have {vectors.shape[1]} features: leave dimensions out", param="dimensions"
        )
    floats = request.encoding_format == "float"
    data = [
        {"object": "embedding", "index": index, "embedding": _listed(vector) if floats else _packed(vector)}
        for index, vector in enumerate(vectors)
    ]
    prompt, tokenizer = model.text_settings.prompt(None, None), model.tokenizer()
    tokens = sum(len(ids) for ids in _ids(tokenizer, [prompt + text for text in request.input]))
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "model": request.model, "data": data, "usage": usage}


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, verbose=False)["input_ids"]


def _listed(vector: Any) -> list[float]:
    return [float(x) for x in vector]


def _packed(vector: Any) -> str:
    """float32, little-endian, in base64; what OpenAI's client asks for."""
    return base64.b64encode(np.ascontiguousarray(vector, dtype="<f4").tobytes()).decode()
