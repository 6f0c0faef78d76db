"""Where a model comes from: a folder, a hub id, or a transformers model in memory; all three lower the same way."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from qeff_ir.errors import ModelLoadError, UnsupportedModelError
from qeff_ir.module import Module

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from qeff_ir.frontend.weights import Weights

_SIDE_FILES = ("*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken")
"""Configuration and tokenizer files; everything of a model folder that is neither weights nor code."""


class Source(ABC):
    """A model that can be lowered.

    Attributes:
        config: The model's configuration.
        retains: Whether it is a causal LM with a cache, not a forward pass without one.
    """

    config: PreTrainedConfig
    retains: ClassVar[bool] = True

    @abstractmethod
    def lower(self) -> Module:
        """Lower the model; weights stay where they are.

        Raises:
            ModelLoadError: The checkpoint is damaged or does not fit the configuration.
            UnsupportedModelError: The model cannot be lowered.
        """

    @abstractmethod
    def identity(self) -> dict[str, Any] | None:
        """What determines the lowered graph, software versions apart, as JSON data; `None` if only lowering tells."""

    @abstractmethod
    def weights(self) -> Weights:
        """The tensors by the names of the parameters; none is read.

        Raises:
            ModelLoadError: See `lower`.
        """

    def weight_files(self) -> list[Path]:
        """The checkpoint's files; none for a model in memory."""
        return []

    @abstractmethod
    def reference(self) -> PreTrainedModel:
        """The transformers model itself, weights in memory, float32."""

    @abstractmethod
    def save_side_files(self, folder: Path) -> None:
        """Put configuration, generation defaults and the tokenizer, where there is one, into `folder`."""


class FolderSource(Source):
    """A model folder with ``config.json`` and safetensors.

    Args:
        folder: The folder.
        trust_remote_code: Whether code of the folder may run; never unless the user says so.

    Raises:
        ModelLoadError: The folder is no model.
        UnsupportedModelError: Its weights are quantized.
    """

    def __init__(self, folder: Path, *, trust_remote_code: bool = False) -> None:
        from qeff_ir.frontend.checkpoint import open_checkpoint

        self.folder = folder
        self.trust_remote_code = trust_remote_code
        self.config = read_config(folder, trust_remote_code)
        if getattr(self.config, "quantization_config", None) is not None:
            raise UnsupportedModelError(
                f"{folder} holds quantized weights (quantization_config in config.json), which are not read yet: use "
                "the unquantized checkpoint, and let the target compress (mxfp6_matmul)"
            )
        self.checkpoint = open_checkpoint(folder)

    def lower(self) -> Module:
        """See `Source.lower`."""
        from qeff_ir.frontend.lower import lower
        from qeff_ir.frontend.skeleton import build_skeleton
        from qeff_ir.frontend.weights import checkpoint_weights

        skeleton = build_skeleton(self.config, trust_remote_code=self.trust_remote_code)
        return lower(skeleton, checkpoint_weights(skeleton, self.checkpoint))

    def weights(self) -> Weights:
        """See `Source.weights`."""
        from qeff_ir.frontend.skeleton import build_skeleton
        from qeff_ir.frontend.weights import checkpoint_weights

        skeleton = build_skeleton(self.config, trust_remote_code=self.trust_remote_code)
        return checkpoint_weights(skeleton, self.checkpoint)

    def identity(self) -> dict[str, Any] | None:
        """The configuration, where the weights are, and the folder's code if it may run."""
        code = sorted(self.folder.glob("*.py")) if self.trust_remote_code else []
        return {
            "config": self.config.to_dict(),
            "code": {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in code},
            "tensors": {k: [e.file.name, e.offset, e.length] for k, e in self.checkpoint.entries.items()},
        }

    def weight_files(self) -> list[Path]:
        """See `Source.weight_files`."""
        return self.checkpoint.files

    def reference(self) -> PreTrainedModel:
        """See `Source.reference`."""
        import torch
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(
            self.folder, dtype=torch.float32, trust_remote_code=self.trust_remote_code
        ).eval()

    def save_side_files(self, folder: Path) -> None:
        """Copy the files; code is not copied."""
        for pattern in _SIDE_FILES:
            for path in sorted(self.folder.glob(pattern)):
                if not path.name.endswith(".index.json"):
                    (folder / path.name).write_bytes(path.read_bytes())


class MemorySource(Source):
    """A transformers model in memory."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval()
        self.config = model.config

    def lower(self) -> Module:
        """See `Source.lower`."""
        from qeff_ir.frontend.lower import lower
        from qeff_ir.frontend.weights import memory_weights

        return lower(self.model, memory_weights(self.model))

    def weights(self) -> Weights:
        """See `Source.weights`."""
        from qeff_ir.frontend.weights import memory_weights

        return memory_weights(self.model)

    def identity(self) -> None:
        """`None`: the model's code may have been changed in memory."""
        return None

    def reference(self) -> PreTrainedModel:
        """The model itself."""
        return self.model

    def save_side_files(self, folder: Path) -> None:
        """Write configuration and generation defaults; a model in memory has no tokenizer."""
        self.config.save_pretrained(folder)
        if self.model.can_generate():
            self.model.generation_config.save_pretrained(folder)


def open_source(name_or_folder: str | Path, *, trust_remote_code: bool = False, **hub: Any) -> FolderSource:
    """Open a causal LM; arguments and errors are those of `find_folder` and `FolderSource`."""
    return FolderSource(find_folder(name_or_folder, **hub), trust_remote_code=trust_remote_code)


def find_folder(name_or_folder: str | Path, **hub: Any) -> Path:
    """A local folder, or the snapshot of a hub id (downloaded once; only the cache is used when offline).

    Args:
        name_or_folder: The folder or hub id.
        hub: ``revision``, ``cache_dir``, ``token``, ``local_files_only`` of `huggingface_hub.snapshot_download`.

    Raises:
        ModelLoadError: There is no such model.
    """
    folder = Path(name_or_folder)
    if not folder.is_dir():
        if folder.exists() or str(name_or_folder).startswith((".", "/", "~")) or str(name_or_folder).count("/") > 1:
            raise ModelLoadError(f"{name_or_folder} is not a model folder: give a folder with config.json, or a hub id")
        folder = _snapshot(str(name_or_folder), hub)
    return folder


def _snapshot(name: str, hub: dict[str, Any]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[*_SIDE_FILES, "*.safetensors", "*.py"], **hub))
    except Exception as error:  # the hub client and its transport raise many unrelated types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelLoadError(
            f"'{name}' is neither a local folder nor a model that the hub or its cache has ({reason})"
        ) from error


def read_config(folder: Path, trust_remote_code: bool) -> PreTrainedConfig:
    """The configuration in a folder.

    Raises:
        ModelLoadError: There is none, it is damaged, or it brings code that may not run.
    """
    from transformers import AutoConfig

    path = folder / "config.json"
    if not path.is_file():
        raise ModelLoadError(
            f"{folder} has no config.json, so it is not a model folder: give the folder of a saved model"
        )
    try:
        raw = json.loads(path.read_text())
        if not isinstance(raw, dict):
            raise ValueError("not a JSON object")
        if "auto_map" in raw and not trust_remote_code:
            raise ModelLoadError(
                f"{folder} brings code of its own (auto_map in config.json): read it, then pass trust_remote_code=True "
                "(--trust-remote-code)"
            )
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except ModelLoadError:
        raise
    except Exception as error:  # transformers raises whatever its many configurations raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelLoadError(f"{path} is not a configuration that transformers reads: {reason[:300]}") from error
