"""The `ai100` backend: emits what Qualcomm's compiler takes, runs it, and opens the device or the emulator."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from backends.ai100 import checks, compiler, flags, one_graph, sdk
from backends.ai100.artifact import model_file
from backends.ai100.emit import BINARY, emit
from backends.ai100.options import Ai100Options, own
from backends.ai100.qnn.request import requested
from backends.ai100.qnn.run import missing as qnn_missing
from backends.ai100.qnn.run import version as qnn_version
from backends.ai100.violation import refuse_first
from backends.base import Backend
from backends.options import CompileOptions
from qeff_ir.errors import CompileError
from qeff_ir.ir.module import Module
from qeff_ir.package import ENCODER, encoder_of
from qeff_ir.runtime.session import Session

if TYPE_CHECKING:
    from qeff_ir.cost import Storage

_MXFP6_BYTES = 25 / 32  # a block of 32 is 24 bytes of codes and one of scale (contract §15.2)
_DEVICES = Path(__file__).with_name("devices")


def _joined(decoder: Callable[[], Module], encoder: Callable[[], Module]) -> Module:
    return one_graph.join(decoder(), encoder())


class Ai100Backend(Backend):
    """Ahead-of-time compilation for Cloud AI 100, by the description of the installed SDK."""

    name: ClassVar[str] = "ai100"
    title: ClassVar[str] = "the package for Qualcomm's compiler"
    runner: ClassVar[str] = "the AI 100 emulator"
    priority: ClassVar[int] = 1
    ahead_of_time: ClassVar[bool] = True
    emitted: ClassVar[str] = "it runs in the emulator; compile_command.json has the compiler's command"
    retains_adapters: ClassVar[bool] = True
    rounds_caches: ClassVar[bool] = True
    dtypes: ClassVar[frozenset[str]] = frozenset({"float32", "float16", "bfloat16"})
    Options: ClassVar[type[CompileOptions]] = Ai100Options
    names_hidden_states: ClassVar[bool] = True
    pipeline: ClassVar[str] = (
        "canonicalize,unflatten,fuse-norms,fuse-rotary,fuse-activations,last-logits,image-merge,"
        "kv-retention{layout=scatter},attention{impl=grouped},gather-blocks,fp16-clip,join-planes,nbits,dequantize,"
        "legalize,decoder-context"
    )

    def missing(self, options: CompileOptions | None = None) -> str | None:
        """Where a compiler was looked for, and the way out; `None` when there is one."""
        if options is not None and requested(own(options)) is not None:
            return qnn_missing()
        try:
            if sdk.probe().compiler is not None:
                return None
        except CompileError as error:
            return str(error)
        looked = " and ".join(str(path) for path in sdk.compiler_candidates())
        return (
            f"there is no AI 100 compiler at {looked}: install the Cloud AI Apps SDK, or set ${sdk.COMPILER_VARIABLE} "
            "to a compiler; a package that is emitted but not compiled runs in the emulator"
        )

    def check_options(self, options: CompileOptions) -> None:
        """Refuse counts out of range, and flags that the compiler does not take.

        Raises:
            CompileError: With what is wrong, and the nearest known flag.
        """
        found, asked = sdk.probe(), own(options)
        target = sdk.choose(found)
        refuse_first(checks.option_violations(asked, target))
        named = flags.resolve(asked, target).hardware if requested(asked) is None else "ai100"
        refuse_first(checks.dtype_violations(asked, named or found.hardware))

    def programs(self, lower: Mapping[str, Callable[[], Module]]) -> Mapping[str, Callable[[], Module]]:
        """See `Backend.programs`; an encoder is in the graph of its decoder."""
        if ENCODER not in lower:
            return lower
        pairs = {name: (found, lower[encoder_of(name)]) for name, found in lower.items() if encoder_of(name) in lower}
        return {name: functools.partial(_joined, *pair) for name, pair in pairs.items()}

    def check(self, module: Module, options: CompileOptions) -> None:
        """Refuse what the compiler would refuse (`checks.violations`).

        Raises:
            CompileError: With the first violation's code and sentence.
        """
        refuse_first(checks.violations(module, own(options), sdk.choose(sdk.probe())))

    def emit(self, module: Module, folder: Path, options: CompileOptions) -> None:
        """Write the compiler's input, and check the files as they are on disk.

        Raises:
            CompileError: A flag is wrong, or the folder breaks the contract (`contract.violations`).
        """
        from backends.ai100 import contract

        found = sdk.probe()
        emit(module, folder, own(options), sdk.choose(found), found.hardware)
        contract.check(folder)

    def compile(self, folder: Path, options: CompileOptions) -> None:
        """Run the compiler, or QNN's tools, inside the folder.

        Raises:
            CompileError: There is no compiler, or it failed.
        """
        compiler.run(sdk.probe().compiler, folder, self.missing())

    def open(self, folder: Path, *, threads: int | None = None) -> Session:
        """Open the device when the package is compiled and the runtime is installed, else the emulator.

        Raises:
            PackageError: The package has no ONNX file, or cannot be loaded.
        """
        if (folder / BINARY).is_file() and _has_runtime():
            from backends.ai100.device import DeviceSession

            return DeviceSession(folder)
        from backends.ai100.emulator import EmulatedSession

        return EmulatedSession(self.model_file(folder), threads=threads)

    def model_file(self, folder: Path) -> Path:
        """The ONNX file, which is named after the model."""
        return model_file(folder)

    def storage(self, options: Mapping[str, Any]) -> Storage:
        """Halves, compressed as the options say."""
        from qeff_ir.cost import Storage

        return Storage(2, _MXFP6_BYTES if options["mxfp6_matmul"] else 2, 1 if options["mxint8_kv_cache"] else 2)

    def devices(self) -> dict[str, Path]:
        """The cards in ``devices/``."""
        return {path.stem: path for path in sorted(_DEVICES.glob("*.json"))}

    def versions(self) -> dict[str, str]:
        """The target description, the installed SDK, and the hardware."""
        found = sdk.probe()
        target = sdk.choose(found)
        return {
            "ai100-target": f"{target.version}-{target.digest}",
            "ai100-apps": found.apps or "none",
            "ai100-hardware": found.hardware,
            "qnn": qnn_version(),
        }


def _has_runtime() -> bool:
    """Whether the runtime's Python module can be imported, from where the SDK puts it too."""
    from backends.ai100 import runtime_path

    runtime_path.extend()
    return importlib.util.find_spec("qaicrt") is not None


BACKEND = Ai100Backend()
