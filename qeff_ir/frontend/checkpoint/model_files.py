"""Everything of a model folder that transformers acts on, and what becomes of it here.

A file or field that transformers reads and that is not read here would change the answers in silence. So each has an
entry, and ``tests/frontend/test_model_files.py`` finds those of the installed transformers that have none.
"""

from __future__ import annotations

from typing import Literal

Treatment = Literal["applied", "copied", "refused", "without effect"]
"""What becomes of a file or field.

``applied``: the compiled model follows it. ``copied``: it is part of the package, whose tokenizer or generation reads
it. ``refused``: the model is, by its name. ``without effect``: no number depends on it.
"""

FILES: dict[str, Treatment] = {
    "config.json": "applied",
    "model.safetensors": "applied",
    "model.safetensors.index.json": "applied",
    "generation_config.json": "copied",
    "tokenizer.json": "copied",
    "tokenizer_config.json": "copied",
    "special_tokens_map.json": "copied",
    "added_tokens.json": "copied",
    "chat_template.jinja": "copied",
    "chat_template.json": "copied",
    "additional_chat_templates": "copied",
    "preprocessor_config.json": "copied",
    "video_preprocessor_config.json": "copied",
    "processor_config.json": "copied",
    "audio_tokenizer_config.json": "copied",
    "modelcard.json": "copied",
    "adapter_config.json": "refused",
    "adapter_model.safetensors": "refused",  # with its configuration; without it, transformers does not look for it
    "adapter_model.bin": "refused",
    "pytorch_model.bin": "refused",
    "pytorch_model.bin.index.json": "refused",
    "custom_generate/generate.py": "refused",  # where it would run: with trust_remote_code
    "custom_generate/requirements.txt": "without effect",
}
"""Files by name, or a folder of files."""

FIELDS: dict[str, Treatment] = {
    "architectures": "applied",
    "auto_map": "applied",  # with trust_remote_code, else refused
    "layer_types": "applied",
    "model_type": "applied",
    "sub_configs": "applied",
    "tie_word_embeddings": "applied",
    "transformers_weights": "applied",
    "extra_files": "applied",  # of a configuration's class, not of a file
    "configuration_files": "refused",
    "fusion_config": "refused",
    "quantization_config": "applied",
    "distributed_config": "without effect",  # set by transformers for a run on several devices
    "dtype": "without effect",  # what is compiled is float32, and the target chooses what it computes in
    "name_or_path": "without effect",
    "output_attentions": "without effect",  # on the weights; what a run returns is asked of the run
    "_attn_implementation": "without effect",
    "_experts_implementation": "without effect",
}
"""Fields of config.json that transformers' loaders look at; all others are the model's own, which reads them itself."""
