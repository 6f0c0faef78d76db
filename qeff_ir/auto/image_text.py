"""`QEFFAutoModelForImageTextToText`: models of pictures and text, as an encoder and a language model."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from backends import find_backend
from qeff_ir.auto.arguments import hub_arguments, model_name
from qeff_ir.auto.compile_arguments import compiler_flags
from qeff_ir.auto.compiled_model import CompiledModel
from qeff_ir.compiler import Compiled, Watch
from qeff_ir.errors import CompileError, ModelLoadError, RuntimeInputError
from qeff_ir.frontend.picture_source import VISION, PictureFolder, PictureMemory, PictureSource
from qeff_ir.frontend.source import find_folder
from qeff_ir.frontend.tasks import IMAGE_TEXT_TO_TEXT
from qeff_ir.ir.ports import ALL_PLANES, AXES, PLANES
from qeff_ir.package import SIDE_FOLDER, opened, program_folder
from qeff_ir.runtime.picture_form import PictureForm
from qeff_ir.side_files import read_generation_config

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from qeff_ir.arrays import Array
    from qeff_ir.passing.pipeline import Pipeline
    from qeff_ir.runtime.generation import SessionLM
    from qeff_ir.runtime.picture_decoder import Pictured, PictureDecoder
    from qeff_ir.runtime.session import Session

_KEPT = 256 << 20
"""Bytes of rows of pictures that are kept, so that the next question about one does not encode it again."""

_TYPES = ("mm_token_type_ids", "token_type_ids")
"""What processors call the types of tokens; the first tells the pictures, whatever else the second may tell."""

_WORDS = 1024
"""Words and new tokens that the context has room for beside the pictures, where nobody says."""


class QEFFAutoModelForImageTextToText(CompiledModel[PictureSource]):
    """A model of pictures and text that is compiled instead of run by torch.

        model = QEFFAutoModelForImageTextToText.from_pretrained("my-model")
        model.compile(prefill_seq_len=128, ctx_len=2048, image_size=(336, 336), num_images=2)
        model.generate(**processor(images=images, text=text, return_tensors="pt"), max_new_tokens=50)

    The package has two programs: ``vision`` makes rows of one picture, and the language model, which keeps the rows of
    up to `num_images` pictures, reads them in the place of placeholder tokens.

    Args:
        model: A transformers model in memory, which stays unchanged.
        processor: Its processor, which says what it makes of a picture.

    Raises:
        ModelLoadError: It is something else.
    """

    def __init__(self, model: PreTrainedModel, processor: Any) -> None:
        if not callable(processor) or not hasattr(processor, "save_pretrained"):
            raise ModelLoadError(
                f"the processor is of type {type(processor).__name__}: give that of the model, as "
                "AutoProcessor.from_pretrained returns it"
            )
        self._open(PictureMemory(model, processor))

    def _open(self, source: PictureSource | None) -> None:
        super()._open(source)
        self._runner: _Runner | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_runner": None}  # sessions stay here, and are opened again there

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        kv_offload: bool = True,
        trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> Self:
        """Open a model folder or a hub id; no weight is loaded.

        Args:
            pretrained_model_name_or_path: The folder or id.
            kv_offload: Whether encoder and language model are two programs; one for both is not supported.
            trust_remote_code: Whether code that comes with the model may run.
            kwargs: ``revision``, ``cache_dir``, ``token``, ``local_files_only`` for the hub.

        Raises:
            ModelLoadError: There is no such model, it cannot be read, or an argument asks for what is not supported.
        """
        if kv_offload is not True:
            raise ModelLoadError("kv_offload=False asks for one program for pictures and text: leave it out")
        hub = hub_arguments(kwargs)
        folder = find_folder(model_name(pretrained_model_name_or_path), **hub)
        return cls._opened(PictureFolder(folder, trust_remote_code=trust_remote_code))

    def compile(
        self,
        *,
        image_size: tuple[int, int],
        num_images: int = 1,
        target: str = "auto",
        prefill_seq_len: int | None = None,
        ctx_len: int | None = None,
        batch_size: int = 1,
        compile_dir: str | Path | None = None,
        pipeline: Pipeline | str | None = None,
        emit_only: bool = False,
        watch: Watch | None = None,
        **options: Any,
    ) -> dict[str, str]:
        """Compile for a target; an equal package in the cache is used as it is.

        Args:
            image_size: Height and width of a picture, as it is given to the processor.
            num_images: Pictures that a prompt may have.
            target: See `qeff_ir.auto.causal_lm.QEFFAutoModelForCausalLM.compile`, as for all others.
            prefill_seq_len: Tokens of a prompt that one prefill run takes; a picture may take several runs, unless its
                tokens see one another.
            ctx_len: Prompt, rows of pictures and new tokens together; by default the rows of all pictures and 1024
                tokens, in whole 128s, as far as the model has positions.
            batch_size: Rows of a run.
            compile_dir: Folder of the package; one in the cache when not given.
            pipeline: Another pipeline than the target's own, or edits of it, for both programs.
            emit_only: Write the package without running the target's compiler.
            watch: Told of every step.
            options: What the target takes beside that, by name, flags of its compiler too.

        Returns:
            Paths of the programs, ``vision_qpc_path`` and ``lang_qpc_path``, as the AI 100 contract has it (§1.9).

        Raises:
            QeffError: See `qeff_ir.compiler.compile_model`.
        """
        given = {
            "prefill_seq_len": prefill_seq_len,
            "ctx_len": ctx_len,
            "batch_size": batch_size,
            **compiler_flags(options),
        }
        return self.compile_with(
            given,
            image_size=image_size,
            num_images=num_images,
            target=target,
            compile_dir=compile_dir,
            pipeline=pipeline,
            emit_only=emit_only,
            watch=watch,
        )

    def compile_with(
        self,
        options: Mapping[str, Any],
        *,
        image_size: tuple[int, int],
        num_images: int,
        compile_dir: str | Path | None = None,
        **rest: Any,
    ) -> dict[str, str]:
        """`compile` with its options by name.

        Args:
            options: Shapes, and what the target takes beside them, compiler flags too; ``ctx_len`` and
                ``prefill_seq_len`` are found where they are `None`.
            image_size: See `compile`, as for all others.
            num_images: Pictures that a prompt may have.
            compile_dir: Folder of the package.
            rest: ``target``, ``pipeline``, ``emit_only`` and ``watch``.
        """
        size, source = _checked_size(image_size), self._source
        if type(num_images) is not int or num_images < 1:
            raise CompileError(f"num_images must be a whole number of at least 1, not {num_images!r}")
        if source is not None:
            source = source.for_pictures(size, num_images)  # another object: this one may be compiled by other threads
            assert source.pictured is not None
            rows, ctx_len = source.pictured.form.rows * num_images, options["ctx_len"]
            if ctx_len is None:
                ctx_len = _default_context(rows, source.config)
            if rows >= ctx_len:
                raise CompileError(
                    f"{num_images} pictures of {size[0]} x {size[1]} take {rows} tokens, and ctx_len is {ctx_len}: "
                    "raise it, or ask for fewer or smaller pictures"
                )
            options = {**options, "ctx_len": ctx_len}
        self._compile(options, compile_dir, source, **rest)
        folder = self.package.folder
        paths = {"vision_qpc_path": program_folder(folder, VISION), "lang_qpc_path": folder}
        return {name: str(path / "qpc" if (path / "qpc").is_dir() else path) for name, path in paths.items()}

    def _accept(self, made: Compiled) -> None:
        super()._accept(made)
        self._runner = None

    def generate(self, inputs: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """`transformers.generate` over the compiled model.

        Args:
            inputs: Token ids, int64 ``[batch, tokens]``; also as ``input_ids=``, with ``attention_mask=``.
            kwargs: What else the processor returns, and everything that transformers' ``generate`` takes.

        Returns:
            Token ids as transformers returns them.

        Raises:
            RuntimeInputError: The request does not fit the compiled model.
            PackageError: The model is not compiled.
        """
        runner = self.runner()
        with runner.model.decoder.request():
            return runner.generate(inputs, kwargs)

    def runner(self, threads: int | None = None) -> _Runner:
        """The sessions that `generate` uses, opened on first use.

        Raises:
            PackageError: The model is not compiled, or its package is damaged.
        """
        with self._lock:
            if self._runner is None:
                from qeff_ir.runtime.generation import SessionLM
                from qeff_ir.runtime.picture_decoder import PictureDecoder

                package = self.package
                with opened(package.folder, package.manifest.key):
                    backend, side = find_backend(package.manifest.target), package.folder / SIDE_FOLDER
                    decoder = PictureDecoder(backend.open(package.folder, threads=threads))
                    vision = backend.open(program_folder(package.folder, VISION), threads=threads)
                    model = SessionLM(decoder, self.config, read_generation_config(side))
                    form = PictureForm.read(side)
                    form.check({port.name: port.shape for port in vision.interface.inputs})
                    trust = isinstance(self._source, PictureFolder) and self._source.trust_remote_code
                    self._runner = _Runner(model, decoder, vision, form, trust_remote_code=trust)
            return self._runner


class _Runner:
    """Both sessions of a package, and the rows of the pictures that it has seen."""

    def __init__(
        self,
        model: SessionLM,
        decoder: PictureDecoder,
        vision: Session,
        form: PictureForm,
        *,
        trust_remote_code: bool = False,
    ) -> None:
        self.model, self.decoder, self.form = model, decoder, form
        self._vision, self._trust = vision, trust_remote_code
        self._rows: OrderedDict[bytes, dict[str, Array]] = OrderedDict()
        self._skeleton: PreTrainedModel | None = None

    def generate(self, inputs: torch.Tensor | None, kwargs: dict[str, Any]) -> Any:
        """Answer one batch, for a thread that has its turn."""
        ids, mask = kwargs.get("input_ids", inputs), kwargs.get("attention_mask")
        found = {name: kwargs.pop(name) for name in (*self.form.inputs, *_TYPES) if name in kwargs}
        given = {name: _array(name, value) for name, value in found.items() if value is not None}
        if not hasattr(ids, "tolist") or getattr(ids, "ndim", 0) != 2:
            return self.model.generate_now(inputs, **kwargs)  # which says what is wrong
        self.decoder.prompts = self._prompts(ids, mask, given)
        try:
            return self.model.generate_now(inputs, **kwargs)
        finally:
            self.decoder.prompts = ()

    def _prompts(self, ids: Any, mask: Any, given: dict[str, Array]) -> list[Pictured]:
        from qeff_ir.runtime.picture_decoder import Pictured

        real = np.ones(tuple(ids.shape), dtype=bool) if mask is None else np.asarray(mask).astype(bool)
        if real.shape != tuple(ids.shape):
            return []  # told by `generate_now`
        tokens = [np.asarray(row)[keep] for row, keep in zip(ids, real, strict=True)]
        counts = self.form.counts([row.tolist() for row in tokens])
        arrays = {name: value for name, value in given.items() if name in self.form.inputs}
        if arrays and not any(counts):
            raise RuntimeInputError("there are pictures, and the text has no placeholder for one: give both together")
        pictures = self.form.split(arrays, counts)
        types = next((given[name] for name in _TYPES if name in given), None)
        if types is not None and (types.shape != real.shape or not np.issubdtype(types.dtype, np.integer)):
            raise RuntimeInputError(
                f"the types of tokens are {types.dtype} {list(types.shape)}, and the tokens {list(real.shape)}: give a "
                "whole number for each"
            )
        prompts: list[Pictured] = []
        for row, own in enumerate(pictures):
            kinds = None if types is None else types[row][real[row]]
            prompts.append(Pictured(self._encoded(own), self._planes(tokens[row], kinds, own), kinds))
        return prompts

    def _encoded(self, pictures: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
        """Rows of the pictures of a prompt, one after the other."""
        made = [self._encode(picture) for picture in pictures]
        return {name: np.concatenate([one[name] for one in made], axis=-2) for name in (made[0] if made else ())}

    def _encode(self, picture: Mapping[str, Array]) -> dict[str, Array]:
        ports = self._vision.interface.inputs
        feeds = {port.name: np.ascontiguousarray(picture[port.name], dtype=port.dtype) for port in ports}
        digest = hashlib.sha256(b"".join(feeds[port.name].tobytes() for port in ports)).digest()
        if digest not in self._rows:
            made = self._vision.run(feeds)
            self._rows[digest] = {name: np.squeeze(rows, axis=-3).astype(np.float32) for name, rows in made.items()}
            while len(self._rows) > 1 and sum(map(_bytes, self._rows.values())) > _KEPT:
                self._rows.popitem(last=False)
        self._rows.move_to_end(digest)
        return self._rows[digest]

    def _planes(self, ids: Array, types: Array | None, pictures: Sequence[Mapping[str, Array]]) -> Array | None:
        """Places of a prompt's tokens, as the model itself finds them; `None` where it has none."""
        import torch

        from qeff_ir.frontend import private
        from qeff_ir.frontend.checkpoint.skeleton import empty_model

        interface = self.decoder.session.interface
        if not pictures or (interface.input(PLANES) is None and interface.input(ALL_PLANES) is None):
            return None
        if self._skeleton is None:
            auto = IMAGE_TEXT_TO_TEXT.auto_class()
            self._skeleton = empty_model(self.model.config, auto=auto, trust_remote_code=self._trust)
        arguments: dict[str, torch.Tensor] = {}
        for name, form in self.form.inputs.items():
            if form.numbers is not None:
                whole = np.concatenate([picture[name] for picture in pictures], axis=form.axis)
                arguments[name] = torch.from_numpy(whole)
        if types is not None:
            arguments["mm_token_type_ids"] = torch.from_numpy(types)[None]
        places = private.places(self._skeleton, torch.from_numpy(ids)[None], arguments)
        return places[-AXES:, 0].numpy()


def _checked_size(size: object) -> tuple[int, int]:
    """Height and width.

    Raises:
        CompileError: They are not two whole numbers.
    """
    pair: tuple[Any, ...] = tuple(size) if isinstance(size, list | tuple) else (size, size)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    if len(pair) != 2 or any(type(n) is not int or n < 1 for n in pair):
        raise CompileError(f"image_size is {size!r}: give height and width in pixels")
    return pair[0], pair[1]


def _default_context(rows: int, config: PreTrainedConfig) -> int:
    """Room for all rows and some words, but no more than a model has positions."""
    wanted = -(-(rows + _WORDS) // 128) * 128
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min(wanted, most) if isinstance(most, int) else wanted


def _bytes(rows: Mapping[str, Array]) -> int:
    return sum(array.nbytes for array in rows.values())


def _array(name: str, value: Any) -> Array:
    """An argument as an array.

    Raises:
        RuntimeInputError: It is none.
    """
    import torch

    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return (value.float() if value.is_floating_point() else value).numpy()  # numpy has no bfloat16
    try:
        return np.asarray(value)
    except (ValueError, TypeError) as error:
        raise RuntimeInputError(f"{name} is no array ({error}): give what the processor returns") from error
