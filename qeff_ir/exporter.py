"""AI 100 packages through ``transformers.exporters``: importing this module registers the format ``ai100``.

from transformers.exporters import AutoHfExporter
from qeff_ir.exporter import Ai100Config

config = Ai100Config(seq_len=[32, 128])
exported = AutoHfExporter.from_config(config).export(model, dict(tokenizer("Hi", return_tensors="pt")), config)
exported(input_ids=..., attention_mask=...).last_hidden_state  # on the device, or in the emulator
exported.save_pretrained("exported")
"""

from __future__ import annotations

import stat
import struct
import uuid
import zipfile
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree
from transformers.exporters.auto import EXPORT_BACKENDS, register_backend
from transformers.exporters.base import HfExporter
from transformers.exporters.configs import ExportConfigMixin
from transformers.exporters.metadata import ExportMetadata, record_output_structure
from transformers.exporters.runners.base import ModelRunner

from qeff_ir.auto.embedding import QEFFAutoModel
from qeff_ir.auto.forward import ForwardModel
from qeff_ir.compiler import cache_root
from qeff_ir.errors import PackageError
from qeff_ir.package import building, digest_file, open_package
from qeff_ir.reading import files_below

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = "ai100"


@dataclass
class Ai100Config(ExportConfigMixin):
    """What to compile for.

    Attributes:
        seq_len: Lengths of the inputs, one specialization for each.
        batch_size: Rows of a run.
        num_cores: Cores of the device.
        num_devices: Devices that share the model.
        emit_only: Whether the AI 100 compiler is left out, as it must be where there is no SDK; the emulator then runs
            the package.
        flags: Any other flag of the compiler, by its Python name.
        quantizer: None is supported; transformers asks for the attribute.
    """

    export_format: str = FORMAT
    seq_len: list[int] = field(default_factory=lambda: [32])
    batch_size: int = 1
    num_cores: int = 16
    num_devices: int = 1
    emit_only: bool = True
    flags: dict[str, Any] = field(default_factory=dict[str, Any])
    quantizer: None = None


class _Whole(QEFFAutoModel):
    """A model with all its outputs, under their own names."""

    def pipeline_for(self, target: str) -> Any:
        return ForwardModel.pipeline_for(self, target)


class Ai100Exporter(HfExporter):
    """Exports one forward pass as an AI 100 package; a program is the package's folder."""

    export_format = FORMAT
    config_class = Ai100Config
    program_suffix = ".ai100.zip"
    required_packages = ["torch"]  # noqa: RUF012 (transformers reads it as an attribute)

    def export_program(
        self, model: PreTrainedModel, sample_inputs: MutableMapping[str, Any], config: ExportConfigMixin
    ) -> tuple[Path, ExportMetadata]:
        """Compile a model's forward pass.

        Args:
            model: Unchanged.
            sample_inputs: Example tensors of its inputs (see `qeff_ir.frontend.inputs.find_inputs`).
            config: An `Ai100Config`.

        Returns:
            The package's folder in the cache, and what transformers records of it.

        Raises:
            QeffError: The model cannot be compiled.
        """
        assert isinstance(config, Ai100Config)
        tensors = {name: value for name, value in sample_inputs.items() if isinstance(value, torch.Tensor)}
        compiled = _Whole(model, inputs=tensors)
        compiled.compile(
            target=FORMAT,
            seq_len=config.seq_len,
            batch_size=config.batch_size,
            num_cores=config.num_cores,
            num_devices=config.num_devices,
            emit_only=config.emit_only,
            **config.flags,
        )
        with torch.no_grad():
            outputs = model.eval()(**tensors)
        metadata = ExportMetadata(
            architecture=type(model).__name__,
            export_dtype="float32",
            export_device="cpu",
            kwargs={n: {"rank": t.dim(), "shape": list(t.shape), "dtype": str(t.dtype)} for n, t in tensors.items()},
            in_spec=pytree.treespec_dumps(pytree.tree_flatten(((), tensors))[1]),
        )
        record_output_structure(metadata, outputs)
        return compiled.package.folder, metadata

    @classmethod
    def save_program(cls, program: Path, path: str | Path) -> None:
        """Write a package as one file, uncompressed."""
        partial = Path(path).with_name(f".{Path(path).name}.partial-{uuid.uuid4().hex[:8]}")
        try:
            with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
                for file in files_below(program):
                    archive.write(file, file.relative_to(program).as_posix())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load_program(cls, path: str | Path) -> Path:
        """Unpack a package into the cache.

        Raises:
            PackageError: The file is no whole package.
        """
        file = Path(path)
        if not file.is_file():
            raise PackageError(f"there is no file {file}: give the folder that save_pretrained made")
        folder = cache_root() / "exports" / digest_file(file)[:16]
        if not _whole(folder):
            with building(folder) as partial:
                try:
                    _unpack(file, partial)
                    open_package(partial)
                except _DAMAGED as error:
                    reason = str(error) or type(error).__name__
                    raise PackageError(
                        f"{file} is not an exported package ({reason}): export the model again"
                    ) from error
        return folder


def _unpack(file: Path, folder: Path) -> None:
    """Unpack an archive as `Ai100Exporter.save_program` writes it: regular files that are stored as they are.

    What is not compressed cannot be larger than the archive, and needs no key.

    Raises:
        PackageError: It has something else.
    """
    with zipfile.ZipFile(file) as archive:
        members = [item for item in archive.infolist() if not item.is_dir()]
        names = {item.filename for item in members}
        for item in members:
            kind = stat.S_IFMT(item.external_attr >> 16)
            if item.flag_bits & _ENCRYPTED or item.compress_type != zipfile.ZIP_STORED or kind not in (0, stat.S_IFREG):
                raise PackageError(f"'{item.filename}' is encrypted, compressed or not a file")
            path = PurePosixPath(item.filename)
            if path.is_absolute() or not {"", ".", ".."}.isdisjoint(item.filename.split("/")) or "\\" in item.filename:
                raise PackageError(f"'{item.filename}' is not a name inside of a folder")
            if not names.isdisjoint(str(above) for above in path.parents):
                raise PackageError(f"'{item.filename}' lies below a file")
        if len(names) < len(members) or sum(item.file_size for item in members) > file.stat().st_size:
            raise PackageError("a file is there twice, or is larger than the archive")
        for item in members:
            archive.extract(item, folder)


_ENCRYPTED = 0x1
_DAMAGED = (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, RuntimeError, struct.error, PackageError)
"""What damaged archives raise, names that no file can have among it."""


def _whole(folder: Path) -> bool:
    try:
        open_package(folder)
    except PackageError:  # there is none yet, or somebody altered it
        return False
    return True


class Ai100Runner(ModelRunner):
    """Runs a package on the device, or in the emulator where there is none."""

    def __init__(self, program: Path, metadata: ExportMetadata) -> None:
        super().__init__(metadata)
        self._encoder = QEFFAutoModel.from_package(program).encoder()

    @property
    def device(self) -> torch.device:
        """The host's: inputs and outputs are there."""
        return torch.device("cpu")

    @classmethod
    def from_program(cls, program: Path, metadata: ExportMetadata, device: Any = None) -> Ai100Runner:
        """A runner of a package; `device` may only be the CPU.

        Raises:
            PackageError: Another device is asked for.
        """
        if device is not None and torch.device(device).type != "cpu":
            raise PackageError(f"an AI 100 package takes its inputs from the CPU, not from {device}: leave device out")
        return cls(program, metadata)

    def __call__(self, share_inputs: bool = True, share_outputs: bool = False, **kwargs: Any) -> Any:
        """Run once; a batch of any size, of lengths up to the largest compiled one."""
        inputs: Mapping[str, Any] = {n: v.detach().numpy() for n, v in kwargs.items() if isinstance(v, torch.Tensor)}
        return self.unflatten([torch.from_numpy(a) for a in self._encoder.run(inputs).values()])


if FORMAT not in EXPORT_BACKENDS:
    register_backend(Ai100Exporter, Ai100Runner)
