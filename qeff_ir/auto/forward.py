"""What every model without a cache has: one forward pass, compiled for some lengths, run on batches of any size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from backends import find_backend
from qeff_ir.auto.arguments import check_compile_arguments, hub_arguments
from qeff_ir.auto.compile_arguments import compiler_flags
from qeff_ir.auto.compiled_model import CompiledModel
from qeff_ir.compiler import Pipelines, Watch, choose_target, pipelines
from qeff_ir.errors import RuntimeInputError
from qeff_ir.frontend.forward_source import ForwardOptions, ForwardSource, encoder_alone
from qeff_ir.frontend.providers.folder import Folder
from qeff_ir.frontend.providers.memory import Memory
from qeff_ir.frontend.providers.opening import find_folder
from qeff_ir.frontend.tasks import EMBEDDING, Task
from qeff_ir.package import MAIN, opened
from qeff_ir.passing.pipeline import Pipeline

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qeff_ir.arrays import Array
    from qeff_ir.frontend.inputs import Wanted
    from qeff_ir.runtime.encoder import Encoder


class ForwardModel(CompiledModel[ForwardSource, "Encoder"]):
    """A model without a cache that is compiled instead of run by torch; see its subclasses.

    Several threads may use one object; a run that goes on while another thread compiles finishes with the package that
    it began with. A session does not live on in a forked process: fork first, then open.

    Args:
        model: A transformers model in memory, which stays unchanged.
        inputs: Names of the inputs to compile with, or an example tensor for each; the main input (and the attention
            mask of token ids) by default.

    Raises:
        ModelLoadError: It is no transformers model.
    """

    task: ClassVar[Task]
    default_length: ClassVar[int] = 32

    def __init__(self, model: PreTrainedModel, *, inputs: Wanted | None = None) -> None:
        self._open(in_memory(model, ForwardOptions(self.task, inputs)))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        inputs: Wanted | None = None,
        part: str | None = None,
        trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> Self:
        """Open a model folder or a hub id; no weight is loaded.

        Args:
            pretrained_model_name_or_path: The folder or id.
            inputs: As for the class.
            part: A part of a model of several, by the name of its configuration: ``vision`` or ``text``, say.
            trust_remote_code: Whether code that comes with the model may run.
            kwargs: ``revision``, ``cache_dir``, ``token``, ``local_files_only`` for the hub.

        Raises:
            ModelLoadError: There is no such model, it cannot be read, or an argument asks for what is not supported.
        """
        folder = find_folder(pretrained_model_name_or_path, **hub_arguments(kwargs))
        options = ForwardOptions(cls.task, inputs, part)
        return cls._opened(ForwardSource(Folder(folder, trust_remote_code=trust_remote_code), options))

    def compile(
        self,
        *,
        target: str = "auto",
        seq_len: int | Sequence[int] | None = None,
        batch_size: int = 1,
        compile_dir: str | Path | None = None,
        pipeline: Pipelines = None,
        emit_only: bool = False,
        watch: Watch | None = None,
        **options: Any,
    ) -> str:
        """Compile for a target; an equal package in the cache is used as it is.

        Args:
            target: ``auto`` (AI 100 when its SDK is installed, else ONNX Runtime), ``onnxruntime`` or ``ai100``.
            seq_len: Lengths of the inputs, one specialization for each; a run takes the smallest that fits.
            batch_size: Rows of a run.
            compile_dir: Folder of the package; one in the cache when not given.
            pipeline: Another pipeline than `pipeline_for` makes, or edits of it (``+my-pass,-fuse-rotary``).
            emit_only: Write the package without running the target's compiler.
            watch: Told of every step, see `qeff_ir.compiler.Watch`.
            options: What the target takes beside that, by name: ``dtype`` and ``materialize`` of
                `backends.options.CompileOptions`, and of the AI 100 (`backends.ai100.options.Ai100Options`)
                ``num_cores``, ``num_devices``, ``mxfp6_matmul``, ``mxint8_kv_cache``, ``weight_free``, ``enable_qnn``,
                any flag of its compiler (``aic_enable_depth_first=True``), and ``force_flags`` for those not known.

        Returns:
            Path of the package (AI 100, compiled: of the ``qpc`` folder in it, as the contract has it).

        Raises:
            QeffError: See `qeff_ir.compiler.compile_model`.
        """
        lengths = self.default_length if seq_len is None else seq_len
        given = {
            "seq_len": tuple(lengths) if isinstance(lengths, Sequence) else (lengths,),
            "batch_size": batch_size,
            **compiler_flags(options),
        }
        check_compile_arguments({"target": target, "pipeline": pipeline})
        target, _ = choose_target(target)
        steps = pipelines(pipeline, self.pipeline_for(target), [MAIN])
        return self._compile(
            given,
            compile_dir,
            target=target,
            pipeline=steps,
            emit_only=emit_only,
            watch=watch,
        )

    def pipeline_for(self, target: str) -> Pipeline:
        """The pipeline that `compile` runs: the target's own."""
        return Pipeline.parse(find_backend(target).pipeline)

    def generate(self, inputs: Any = None, **kwargs: Any) -> dict[str, Array]:
        """Run the forward pass once on a batch of any size.

        Args:
            inputs: What a tokenizer or processor returns.
            kwargs: The same, input by input (``input_ids=``).

        Returns:
            Outputs by name, float32; see `qeff_ir.runtime.encoder.Encoder.run`.

        Raises:
            RuntimeInputError: An input does not fit the compiled model.
            PackageError: The model is not compiled.
        """
        return self.encoder().run(named(inputs, kwargs))

    def encoder(self, threads: int | None = None) -> Encoder:
        """The session that `generate` uses, see `runner`."""
        return self.runner(threads)

    def _open_runner(self, threads: int | None) -> Encoder:
        from qeff_ir.runtime.encoder import Encoder

        package = self.package
        with opened(package.folder, package.manifest.key):
            return Encoder(find_backend(package.manifest.target).open(package.folder, threads=threads))


def named(inputs: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a tokenizer or processor returns, and the same input by input, as one.

    Raises:
        RuntimeInputError: It is no mapping.
    """
    if inputs is not None and not isinstance(inputs, Mapping):
        raise RuntimeInputError(f"inputs is a {type(inputs).__name__}: give arrays by name, as a tokenizer does")
    return {**(inputs or {}), **kwargs}


def in_memory(model: PreTrainedModel, options: ForwardOptions) -> ForwardSource:
    """A model in memory as a source; of an encoder-decoder, the encoder.

    Raises:
        ModelLoadError: It is no transformers model.
    """
    provider = Memory(model)
    if options.task is EMBEDDING:
        provider = Memory(encoder_alone(model))
    return ForwardSource(provider, options)
