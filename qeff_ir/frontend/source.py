"""Where a model comes from: a folder, a hub id, or a transformers model in memory; all three lower the same way."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qeff_ir.errors import ModelLoadError, QeffError, UnsupportedModelError, first_line
from qeff_ir.frontend.checkpoint.folder_files import PATTERNS, read_side_files, write_side_files
from qeff_ir.frontend.tasks import CAUSAL_LM, Task
from qeff_ir.ir.module import Module
from qeff_ir.package import MAIN
from qeff_ir.reading import files_below, read_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from qeff_ir.frontend.checkpoint.processors import PartKind
    from qeff_ir.frontend.checkpoint.references import Checkpoint
    from qeff_ir.frontend.checkpoint.weights import Weights


class Source(ABC):
    """A model that can be lowered.

    Attributes:
        config: The model's configuration.
        task: What it is for.
    """

    config: PreTrainedConfig
    task: Task = CAUSAL_LM

    @abstractmethod
    def opened(self) -> tuple[PreTrainedModel, Weights]:
        """A model to be traced, with weights or without, and the tensors by the names of its parameters; none is read.

        Raises:
            ModelLoadError: The checkpoint is damaged or does not fit the configuration.
            UnsupportedModelError: The model cannot be made, or cannot be traced as it is.
        """

    def lower(self) -> Module:
        """Lower the model; weights stay where they are.

        Raises:
            ModelLoadError: See `opened`.
            UnsupportedModelError: The model cannot be lowered.
        """
        from qeff_ir.frontend.export.lower import lower

        return lower(*self.opened())

    def programs(self) -> Mapping[str, Callable[[], Module]]:
        """The programs of the model's package by name, each with what lowers it; `MAIN` is one of them.

        All share the model's weights and its side files. Most models are one program.
        """
        return {MAIN: self.lower}

    def identity(self) -> dict[str, Any] | None:
        """What determines the lowered graph, software versions apart, as JSON data; `None` if only lowering tells."""
        return None

    def weights(self) -> Weights:
        """The tensors by the names of the parameters; none is read.

        Raises:
            ModelLoadError: See `opened`.
        """
        return self.opened()[1]

    def processor_of(self, kind: PartKind) -> Any:
        """The part of the model's processor that makes numbers of pictures, videos or recordings.

        Raises:
            QeffError: There is none, or none that can be read.
        """
        raise ModelLoadError(f"{type(self.config).__name__} comes without a processor: give the model's")

    def weight_files(self) -> list[Path]:
        """The checkpoint's files; none for a model in memory."""
        return []

    @abstractmethod
    def reference(self) -> PreTrainedModel:
        """The transformers model itself, weights in memory, float32."""

    def decoded_here(self) -> bool:
        """Whether `reference` has quantized weights that were decoded by us: transformers does not load them here."""
        return False

    def save_side_files(self, folder: Path) -> None:
        """Put configuration, generation defaults and the tokenizer, where there is one, into `folder`."""
        self.config.to_json_file(folder / "config.json")


class FolderSource(Source):
    """A model folder with ``config.json`` and safetensors, or a GGUF file in it that is a model by itself.

    Its configuration and tokenizer files are read once, here: what is compiled later belongs together.

    Args:
        folder: The folder.
        gguf_file: The name of the GGUF file, if it is one; nothing beside it is read then.
        trust_remote_code: Whether code of the folder may run; never unless the user says so.

    Raises:
        ModelLoadError: The folder is no model.
        UnsupportedModelError: Something in it that transformers acts on is not supported: quantized weights, say.
    """

    partial = False
    """Whether the checkpoint may lack weights; what reads them cannot be lowered then."""

    def __init__(self, folder: Path, *, gguf_file: str | None = None, trust_remote_code: bool = False) -> None:
        from qeff_ir.frontend.checkpoint.config import (
            CONFIG,
            QUANTIZATION,
            check_sizes,
            make_config,
            read_fields,
            remote_code,
        )

        self.folder = folder
        self.trust_remote_code = trust_remote_code
        self._remote, self._named_weights, self.gguf = list[str](), None, None
        self._quantization: object = None
        if gguf_file is not None:
            from qeff_ir.frontend.gguf.model import GgufModel

            self.gguf = GgufModel(folder, gguf_file)
            self.checkpoint, self.config = self.gguf.checkpoint, self.gguf.config
            return
        _refuse_what_is_not_applied(folder, trust_remote_code)
        with _readable(folder):
            self._side_files = read_side_files(folder)
        fields = read_fields(folder, trust_remote_code, self._side_files.get(CONFIG))
        self._named_weights = fields.get("transformers_weights")
        self._remote = remote_code(fields)
        self._quantization = fields.get(QUANTIZATION)
        self.checkpoint = self._open()
        sizes = [size for entry in self.checkpoint.entries.values() for size in entry.shape]
        check_sizes(fields, folder, len(self.checkpoint.entries), max(sizes, default=0))
        self.config = make_config(fields, folder, trust_remote_code)
        if extra := type(self.config).extra_files:
            self.checkpoint = self._open(extra)

    def _open(self, extra: Iterable[str] = ()) -> Checkpoint:
        """The checkpoint, with the weights that its format makes of several tensors."""
        from qeff_ir.frontend.checkpoint.config import CONFIG
        from qeff_ir.frontend.checkpoint.formats import weight_format
        from qeff_ir.frontend.checkpoint.references import open_checkpoint

        with _readable(self.folder):
            found = open_checkpoint(self.folder, self._named_weights, extra)
            if self._quantization is None:
                return found
            return found.decode(weight_format(self._quantization, str(self.folder / CONFIG)))

    def opened(self) -> tuple[PreTrainedModel, Weights]:
        """The model without weights, and the weights; sizes are compared before anything large is made of them."""
        from qeff_ir.frontend.checkpoint.skeleton import compute_buffers
        from qeff_ir.frontend.checkpoint.weights import checkpoint_weights

        self.checkpoint.check_unchanged()
        model = self._skeleton()
        if self.gguf is not None:
            weights = self.gguf.weights(model, partial=self.partial)
        else:
            weights = checkpoint_weights(model, self.checkpoint, partial=self.partial)
        with self._buildable():
            compute_buffers(model)
        return model, weights

    def _skeleton(self) -> PreTrainedModel:
        from qeff_ir.frontend.checkpoint.references import SINGLE
        from qeff_ir.frontend.checkpoint.skeleton import empty_model

        with self._buildable():
            model = empty_model(
                self.config,
                trust_remote_code=self.trust_remote_code,
                auto=self._auto(),
                tensors=len(self.checkpoint.entries),
            )
        if self._named_weights is not None and type(model.config) is not type(self.config):
            raise UnsupportedModelError(
                f"{self.folder / 'config.json'} names the weights of a model of several parts (transformers_weights), "
                f"of which only one is taken: name the file {SINGLE}, and take the field out"
            )
        return model

    def _auto(self) -> Any:
        """transformers' auto class."""
        return self.task.auto_class()

    @contextlib.contextmanager
    def _buildable(self) -> Generator[None]:
        """Turn what transformers raises while it makes a model of a configuration into one sentence."""
        try:
            yield
        except QeffError:
            raise
        except Exception as error:  # transformers raises whatever its many models raise
            from qeff_ir.frontend.private import loads

            kind, auto = getattr(self.config, "model_type", "") or type(self.config).__name__, self._auto()
            if not self._remote and not loads(auto, self.config):
                raise UnsupportedModelError(
                    f"{self.folder} is a model of type {kind}, which {auto.__name__} does not load: open it with the "
                    "class for what it does"
                ) from error
            raise ModelLoadError(
                f"transformers cannot make the model of type {kind} that {self.folder / 'config.json'} asks for: "
                f"{first_line(error)}"
            ) from error

    def processor_of(self, kind: PartKind) -> Any:
        """See `Source.processor_of`.

        Raises:
            ModelLoadError: There is none that can be read.
        """
        from qeff_ir.frontend.checkpoint.processors import read_part

        return read_part(kind, self.folder, trust_remote_code=self.trust_remote_code)

    def identity(self) -> dict[str, Any] | None:
        """The configuration, how and where the weights are, and the folder's code if it may run.

        What else is decided while weights are loaded, which of them are tied, say, follows from these and from the
        digests of `weight_files`.
        """
        if self.trust_remote_code and any("--" in reference for reference in self._remote):
            return None  # code of another repository, which is not in the folder
        code = files_below(self.folder, "*.py", error=ModelLoadError) if self.trust_remote_code else []
        files = {file: index for index, file in enumerate(self.checkpoint.files)}
        return {
            "config": self.config.to_dict(),
            "quantization": self._quantization,
            "code": {
                str(p.relative_to(self.folder)): hashlib.sha256(read_bytes(p, self.folder)).hexdigest() for p in code
            },
            "tensors": {k: [files[e.file], e.offset, e.length] for k, e in self.checkpoint.entries.items()},
        }

    def weight_files(self) -> list[Path]:
        """See `Source.weight_files`.

        Raises:
            ModelLoadError: One was changed since the folder was opened.
        """
        self.checkpoint.check_unchanged()
        return self.checkpoint.files

    def reference(self) -> PreTrainedModel:
        """See `Source.reference`; quantized weights are dequantized by transformers, if it can."""
        return self.loaded("float32")

    def loaded(self, dtype: str) -> PreTrainedModel:
        """The transformers model, loaded in a type of torch's by its name."""
        import torch

        from qeff_ir.frontend.private import float32_scales

        if self.decoded_here():
            return self._decoded_model()
        config = copy.deepcopy(self.config)
        if self.checkpoint.reference is not None:
            config.quantization_config = copy.deepcopy(self.checkpoint.reference)
        with self._buildable(), float32_scales():
            return (
                self._auto()
                .from_pretrained(
                    self.folder,
                    config=config,
                    dtype=getattr(torch, dtype),
                    trust_remote_code=self.trust_remote_code,
                    **({} if self.gguf is None else {"gguf_file": self.gguf.name}),
                )
                .eval()
            )

    def decoded_here(self) -> bool:
        """See `Source.decoded_here`."""
        return bool(self.checkpoint.decoded) and self.checkpoint.reference is None

    def _decoded_model(self) -> PreTrainedModel:
        """The model with the numbers of quantized weights, in float32."""
        import numpy as np
        import torch

        weights = self.weights()
        with self._buildable():
            model = self._auto().from_config(
                copy.deepcopy(self.config), dtype=torch.float32, trust_remote_code=self.trust_remote_code
            )
        with torch.no_grad():
            for name, tensor in model.state_dict(keep_vars=True).items():
                tensor.copy_(torch.from_numpy(np.array(weights[name].numpy())))
        return model.eval()

    def save_side_files(self, folder: Path) -> None:
        """Write the files as they were when the folder was opened; code is not written."""
        write_side_files(self._side_files if self.gguf is None else self.gguf.side_files, folder)


def _refuse_what_is_not_applied(folder: Path, trust_remote_code: bool) -> None:
    """Files that transformers acts on, and that change the answers."""
    if (folder / "config.json").is_file() and (folder / "adapter_config.json").is_file():
        raise UnsupportedModelError(
            f"{folder} holds an adapter beside the model (adapter_config.json), which transformers would apply: move "
            "it to a folder of its own and open that with QEffAutoPeftModelForCausalLM and base_model=, or remove it"
        )
    if trust_remote_code and (folder / "custom_generate" / "generate.py").is_file():
        raise UnsupportedModelError(
            f"{folder} replaces transformers' generate (custom_generate/generate.py), which is not supported: remove "
            "it, or leave trust_remote_code out"
        )


@contextlib.contextmanager
def _readable(folder: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise ModelLoadError(f"{folder} cannot be read ({error.strerror or error}): check its permissions") from error


class MemorySource(Source):
    """A transformers model in memory, which stays as it is: in training mode, say.

    Args:
        model: The model.
        processor: Its processor, or the part of it that makes the model's inputs; a model of texts needs none.

    Raises:
        ModelLoadError: It is no transformers model.
    """

    def __init__(self, model: PreTrainedModel, processor: Any = None) -> None:
        from transformers import PreTrainedModel

        if not isinstance(model, PreTrainedModel):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ModelLoadError(f"{type(model).__name__} is no transformers model: use from_pretrained() for a folder")
        self.model, self.config, self.processor = model, model.config, processor

    def opened(self) -> tuple[PreTrainedModel, Weights]:
        """See `Source.opened`."""
        from qeff_ir.frontend.checkpoint.weights import memory_weights

        model = self.copy()
        return model, memory_weights(model)

    def copy(self) -> PreTrainedModel:
        """The model that is lowered: see `qeff_ir.frontend.structure`."""
        from qeff_ir.frontend.structure import structure

        return structure(self.model)

    def processor_of(self, kind: PartKind) -> Any:
        """See `Source.processor_of`.

        Raises:
            UnsupportedModelError: The processor has none for videos.
        """
        from qeff_ir.frontend.checkpoint.processors import part_of

        return part_of(kind, self.processor)

    def reference(self) -> PreTrainedModel:
        """The model in evaluation mode: itself, or a copy with the same weights if it is in training."""
        if not any(module.training for module in self.model.modules()):
            return self.model
        shared = {id(t): t for t in itertools.chain(self.model.parameters(), self.model.buffers())}
        return copy.deepcopy(self.model, shared).eval()

    def save_side_files(self, folder: Path) -> None:
        """Write configuration and generation defaults, as they are, and the processor, which has the tokenizer."""
        super().save_side_files(folder)
        if self.model.can_generate():
            defaults = self.model.generation_config
            defaults.to_json_file(folder / "generation_config.json", keys_to_pop=["compile_config"])
        if self.processor is not None:
            self.processor.save_pretrained(folder)


def open_source(
    name_or_folder: str | Path, *, gguf_file: str | None = None, trust_remote_code: bool = False, **hub: Any
) -> FolderSource:
    """Open a causal LM: a folder, a hub id, or a GGUF file, by its own path or by its name in a folder or on the hub.

    Arguments and errors are those of `find_folder` and `FolderSource`.
    """
    if gguf_file is None and _is_gguf(name_or_folder):
        path = Path(name_or_folder)
        return FolderSource(path.parent, gguf_file=path.name, trust_remote_code=trust_remote_code)
    folder = find_folder(name_or_folder, gguf_file, **hub)
    return FolderSource(folder, gguf_file=gguf_file, trust_remote_code=trust_remote_code)


def _is_gguf(name: str | Path) -> bool:
    try:
        return str(name).endswith(".gguf") and Path(name).is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def find_folder(name_or_folder: str | Path, gguf_file: str | None = None, **hub: Any) -> Path:
    """A local folder, or the snapshot of a hub id (downloaded once; only the cache is used when offline).

    Args:
        name_or_folder: The folder or hub id.
        gguf_file: Of the hub, this file alone.
        hub: ``revision``, ``cache_dir``, ``token``, ``local_files_only`` of `huggingface_hub.snapshot_download`.

    Raises:
        ModelLoadError: There is no such model.
    """
    if not isinstance(name_or_folder, str | Path):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ModelLoadError(f"{name_or_folder!r:.100} is not a model folder: give a folder or a hub id")
    folder, name = Path(name_or_folder), str(name_or_folder)
    try:
        if folder.is_dir():
            return folder
        local = folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1
    except (OSError, ValueError):  # a name that no file can have
        local = True
    if local:
        raise ModelLoadError(f"{name!a:.200} is not a model folder: give a folder with config.json, or a hub id")
    return _snapshot(name, [gguf_file] if gguf_file is not None else _PATTERNS, hub)


_PATTERNS = (*PATTERNS, "*.safetensors", "*.py", "*_Dense/*.bin")


def _snapshot(name: str, patterns: Sequence[str], hub: dict[str, Any]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns), **hub))
    except Exception as error:  # the hub client and its transport raise many unrelated types
        raise ModelLoadError(
            f"'{name}' is neither a local folder nor a model that the hub or its cache has ({first_line(error)})"
        ) from error
