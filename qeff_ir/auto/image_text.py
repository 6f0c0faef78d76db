"""`QEFFAutoModelForImageTextToText`: models of pictures and text, as an encoder and a language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from backends import find_backend
from qeff_ir.auto.arguments import hub_arguments, model_name
from qeff_ir.auto.generative import GenerativeModel
from qeff_ir.auto.picture_sizes import picture_sizes
from qeff_ir.auto.qaic_config import loaded
from qeff_ir.compiler import Pipelines, TokenEmbedding, Watch
from qeff_ir.errors import CompileError, ModelLoadError, RuntimeInputError
from qeff_ir.frontend.picture_source import PictureSource
from qeff_ir.frontend.providers.folder import Folder
from qeff_ir.frontend.providers.memory import Memory
from qeff_ir.frontend.providers.opening import find_folder
from qeff_ir.frontend.source import Source
from qeff_ir.package import MAIN, SIDE_FOLDER, opened, program_folder
from qeff_ir.runtime.picture_forms import PictureForms
from qeff_ir.side_files import read_generation_config

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from qeff_ir.arrays import Array
    from qeff_ir.auto.picture_runner import PictureRunner

_WORDS = 1024
"""Words and new tokens that the context has room for beside the pictures, where nobody says."""


class QEFFAutoModelForImageTextToText(GenerativeModel[PictureSource, "PictureRunner"]):
    """A model of pictures and text that is compiled instead of run by torch.

        model = QEFFAutoModelForImageTextToText.from_pretrained("my-model")
        model.compile(prefill_seq_len=128, ctx_len=2048, image_size=(336, 336), num_images=2)
        model.generate(**processor(images=images, text=text, return_tensors="pt"), max_new_tokens=50)

    The package has two programs: ``vision`` makes rows of one picture, and the language model, which keeps the rows of
    up to `num_images` pictures, reads them in the place of placeholder tokens. Of several sizes of pictures, each has
    an encoder of its own. With ``kv_offload=False``, one program takes pixels and tokens.

    Args:
        model: A transformers model in memory, which stays unchanged.
        processor: Its processor, which says what it makes of a picture.
        kv_offload: See `from_pretrained`.

    Raises:
        ModelLoadError: It is something else.
    """

    def __init__(self, model: PreTrainedModel, processor: Any, *, kv_offload: bool = True) -> None:
        if not callable(processor) or not hasattr(processor, "save_pretrained"):
            raise ModelLoadError(
                f"the processor is of type {type(processor).__name__}: give that of the model, as "
                "AutoProcessor.from_pretrained returns it"
            )
        self._open(_single(PictureSource(Memory(model, processor)), kv_offload))

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
            kv_offload: Whether encoder and language model are two programs. One for both (`False`) takes pixels and
                tokens (AI 100 contract §1.8): every prefill run encodes the pictures of all rows, and so does every
                decode run on ONNX Runtime, which has no compiler to leave the encoder out.
            trust_remote_code: Whether code that comes with the model may run.
            kwargs: See `qeff_ir.auto.causal_lm.QEFFAutoModelForCausalLM.from_pretrained`.

        Raises:
            ModelLoadError: There is no such model, it cannot be read, or an argument asks for what is not supported.
        """
        rest, asked = loaded(kwargs)
        folder = find_folder(model_name(pretrained_model_name_or_path), **hub_arguments(rest))
        source = _single(PictureSource(Folder(folder, trust_remote_code=trust_remote_code)), kv_offload)
        return cls._opened(source)._asking(asked)

    @classmethod
    def _open_checkpoint(cls, name: str | Path) -> Source:
        return PictureSource(Folder(find_folder(name)))

    def compile(
        self,
        *,
        image_size: int | tuple[int, int] | Sequence[tuple[int, int]] | None = None,
        num_images: int = 1,
        num_frames: int | None = None,
        num_videos: int | None = None,
        target: str = "auto",
        prefill_seq_len: int | None = None,
        ctx_len: int | None = None,
        batch_size: int = 1,
        compile_dir: str | Path | None = None,
        pipeline: Pipelines = None,
        token_embedding: TokenEmbedding = "graph",
        emit_only: bool = False,
        watch: Watch | None = None,
        **options: Any,
    ) -> dict[str, str] | str:
        """Compile for a target; an equal package in the cache is used as it is.

        Args:
            image_size: Height and width of a picture, as it is given to the processor; or several of them, each with
                an encoder of its own. The incumbent's names for it are known as well
                (`qeff_ir.auto.picture_sizes.picture_sizes`).
            num_images: Pictures that a prompt may have.
            num_frames: Compile for videos of so many frames of this size in the place of pictures: frames that the
                video processor keeps (``do_sample_frames=False`` keeps all).
            num_videos: Videos that a prompt may have; 1 by default.
            target: See `qeff_ir.auto.causal_lm.QEFFAutoModelForCausalLM.compile`, as for all others.
            prefill_seq_len: Tokens of a prompt that one prefill run takes; a picture may take several runs, unless its
                tokens see one another.
            ctx_len: Prompt, rows of pictures and new tokens together; by default the rows of all pictures and 1024
                tokens, in whole 128s, as far as the model has positions.
            batch_size: Rows of a run.
            compile_dir: Folder of the package; one in the cache when not given.
            pipeline: Another pipeline than the target's own, or edits of it, for all programs; or a mapping from names
                of programs (``main`` is the language model) to such.
            token_embedding: Who looks up the vectors of the tokens. ``host``: the package leaves their table out, and
                its rows are read from the checkpoint. The tokens stay an input, as they tell the places of pictures.
            emit_only: Write the package without running the target's compiler.
            watch: Told of every step.
            options: What the target takes beside that, by name, flags of its compiler too.

        Returns:
            Paths of the programs, ``vision_qpc_path`` and ``lang_qpc_path``, as the AI 100 contract has it (§1.9); of
            several sizes ``vision_336x336_qpc_path`` and so on. That of a single program alone.

        Raises:
            QeffError: See `qeff_ir.compiler.compile_model`.
        """
        sizes, options = picture_sizes({"image_size": image_size, **options})
        if (num_frames is not None and num_images != 1) or (num_frames is None and num_videos is not None):
            raise CompileError("a package is for pictures or for videos: give num_images, or num_frames and num_videos")
        given = {
            "prefill_seq_len": prefill_seq_len,
            "ctx_len": ctx_len,
            "batch_size": batch_size,
            **self._flags(options),
        }
        return self.compile_with(
            given,
            image_size=sizes,
            num_images=num_images if num_frames is None else 1 if num_videos is None else num_videos,
            num_frames=num_frames,
            target=target,
            compile_dir=compile_dir,
            pipeline=pipeline,
            edits=self._edits(options),
            token_embedding=token_embedding,
            emit_only=emit_only,
            watch=watch,
        )

    def compile_with(
        self,
        options: Mapping[str, Any],
        *,
        image_size: Sequence[tuple[int, int]],
        num_images: int,
        num_frames: int | None = None,
        compile_dir: str | Path | None = None,
        **rest: Any,
    ) -> dict[str, str] | str:
        """`compile` with its options by name.

        Args:
            options: Shapes, and what the target takes beside them, compiler flags too; ``ctx_len`` and
                ``prefill_seq_len`` are found where they are `None`.
            image_size: Height and width of pictures, of each size once.
            num_images: Pictures that a prompt may have, or videos.
            num_frames: Frames of a video; `None` for pictures.
            compile_dir: Folder of the package.
            rest: ``target``, ``pipeline``, ``token_embedding``, ``emit_only`` and ``watch``.
        """
        source = self._source
        if type(num_images) is not int or num_images < 1:
            name = "num_images" if num_frames is None else "num_videos"
            raise CompileError(f"{name} must be a whole number of at least 1, not {num_images!r}")
        if num_frames is not None and (type(num_frames) is not int or num_frames < 1):
            raise CompileError(f"num_frames must be a whole number of at least 1, not {num_frames!r}")
        if source is not None:
            batch = options.get("batch_size") or 1
            if source.single_program and options.get("prefill_seq_len") == 1:
                raise CompileError("a run of one token reads no picture: give prefill_seq_len=2 or more")
            # Another object: other threads may compile this one.
            source = source.for_pictures(image_size, num_images, batch, num_frames or 0)
            assert source.pictured is not None
            forms, rows = source.pictured.forms, source.pictured.features.rows * num_images
            ctx_len = options["ctx_len"]
            if ctx_len is None:
                ctx_len = _default_context(rows, source.config)
            if rows >= ctx_len:
                raise CompileError(
                    f"{num_images} {forms.what} of {forms.said} take up to {rows} tokens, and ctx_len is {ctx_len}: "
                    f"raise it, or ask for fewer or smaller {forms.what}"
                )
            options = {**options, "ctx_len": ctx_len}
        path = self._compile(options, compile_dir, source, **rest)
        if list(self.package.manifest.programs) == [MAIN]:
            return path
        folder = self.package.folder
        encoders = [name for name in self.package.manifest.programs if name != MAIN]
        alone = {None: "lang", True: "lang_prefill", False: "lang_decode"}[options.get("prefill_only")]
        paths = {alone: folder} | {name: program_folder(folder, name) for name in encoders}
        return {f"{name}_qpc_path": str(p / "qpc" if (p / "qpc").is_dir() else p) for name, p in paths.items()}

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        *,
        prompts: Sequence[str] | str | None = None,
        images: Any = None,
        processor: Any = None,
        resize: bool = False,
        **kwargs: Any,
    ) -> Any:
        """`transformers.generate` over the compiled model, or texts for a list of prompts about pictures.

        Args:
            inputs: Token ids, int64 ``[batch, tokens]``; also as ``input_ids=``, with ``attention_mask=``.
            prompts: Texts instead of what the processor returns; any number, run in batches of the compiled size. One
                without a token for a picture goes through the chat template of the processor.
            images: A list of pictures for each prompt, each one of Pillow or uint8 ``[height, width, 3]``; also one
                picture for each prompt, or all pictures of the only prompt.
            processor: The model's processor, needed with `prompts`.
            resize: Whether pictures that have none of the compiled sizes are resized to the nearest.
            kwargs: What else the processor returns, and everything that transformers' ``generate`` takes.

        Returns:
            Token ids as transformers returns them; a `qeff_ir.runtime.texts.GenerationResult` for `prompts`.

        Raises:
            RuntimeInputError: The request does not fit the compiled model.
            PackageError: The model is not compiled.
        """
        runner = self.runner()
        texts = self._texts(inputs, prompts, images, processor, resize=resize)
        with runner.decoder.request():
            if texts is None:
                return runner.generate(inputs, kwargs)
            return runner.answer(texts, images, processor, kwargs, resize=resize)

    def _texts(
        self, inputs: object, prompts: Sequence[str] | str | None, images: Any, processor: Any, *, resize: bool
    ) -> list[str] | None:
        """The prompts, before the turn, as a generator may run anything; `None` for token ids.

        Raises:
            RuntimeInputError: Arguments of one way to ask are given for the other.
        """
        from qeff_ir.runtime.texts import as_texts

        if prompts is None:
            _none_of_prompts(images=images, processor=processor, resize=resize or None)
            return None
        if processor is None or inputs is not None:
            raise RuntimeInputError("prompts need processor=, the model's, and nothing that it returns")
        return as_texts(prompts)

    def score(
        self,
        *,
        tokens: Sequence[int | str],
        prompts: Sequence[str] | str | None = None,
        images: Any = None,
        processor: Any = None,
        resize: bool = False,
        **kwargs: Any,
    ) -> Array:
        """How the probability of the next token is shared among some tokens, as rerankers are read ("no" and "yes").

        Args:
            tokens: By id, or with `processor` as texts of one token each.
            prompts: As for `generate`; any number.
            images: As for `generate`.
            processor: As for `generate`.
            resize: As for `generate`.
            kwargs: What the processor returns, in the place of prompts; any number of rows.

        Returns:
            float32 ``[rows, tokens]``, see `qeff_ir.runtime.read_out.shares`.

        Raises:
            RuntimeInputError: The request does not fit the compiled model, or a token is none.
            PackageError: The model is not compiled.
        """
        from qeff_ir.runtime.read_out import shares

        runner = self.runner()
        runner.decoder.check_scores()
        texts = self._read_texts(prompts, images, kwargs, resize=resize)
        with runner.decoder.request():
            logits = self._last(runner, texts, images, processor, kwargs, resize=resize)
        return shares(logits, tokens, getattr(processor, "tokenizer", None))

    def _read_texts(self, prompts: object, images: Any, kwargs: dict[str, Any], *, resize: bool) -> list[str] | None:
        """The prompts that are read and not answered, before the turn; `None` for what a processor returns.

        Raises:
            RuntimeInputError: Arguments of one way to ask are given for the other.
        """
        from qeff_ir.runtime.texts import as_texts

        if (prompts is None) == (not kwargs):
            raise RuntimeInputError("give prompts, images and processor, or what the processor returns")
        if prompts is None:
            _none_of_prompts(images=images, resize=resize or None)
            return None
        return as_texts(prompts)

    def _last(
        self,
        runner: PictureRunner,
        texts: Sequence[str] | None,
        images: Any,
        processor: Any,
        kwargs: dict[str, Any],
        *,
        resize: bool,
        lora_ids: Sequence[int] | None = None,
    ) -> Array:
        """What the language model returns for the last token of each row, ``[rows, width]``; the thread has its turn.

        `lora_ids` are the slots of their adapters.
        """
        if texts is None:
            return runner.last(kwargs, lora_ids)
        return runner.last_of_prompts(texts, images, processor, resize=resize, lora_ids=lora_ids)

    def _open_runner(self, threads: int | None) -> PictureRunner:
        from qeff_ir.auto.picture_runner import PictureRunner
        from qeff_ir.runtime.generation import SessionLM
        from qeff_ir.runtime.picture_decoder import PictureDecoder
        from qeff_ir.runtime.session import Session

        package = self.package
        with opened(package.folder, package.manifest.key):
            backend, side = find_backend(package.manifest.target), package.folder / SIDE_FOLDER
            forms, encoders = PictureForms.read(side), dict[str, Session]()
            single = forms.sizes[0].program == MAIN
            main = backend.open(package.folder, threads=threads)
            decoder = PictureDecoder(main, forms if single else None, self._table(main.interface))
            model = SessionLM(decoder, self.config, read_generation_config(side))
            for form in () if single else forms.sizes:
                session = backend.open(program_folder(package.folder, form.program), threads=threads)
                form.check({port.name: port.shape for port in session.interface.inputs})
                encoders[form.program] = session
            trust = self._source is not None and self._source.provider.trust_remote_code
            return PictureRunner(model, decoder, encoders, forms, trust_remote_code=trust)


def _single(source: PictureSource, kv_offload: bool) -> PictureSource:
    """The source of a single program where `kv_offload` is `False`.

    Raises:
        ModelLoadError: It is neither `True` nor `False`.
    """
    if type(kv_offload) is not bool:
        raise ModelLoadError(
            f"kv_offload is {kv_offload!r}: give True for a vision and a language program, or False for one program"
        )
    source.single_program = not kv_offload
    return source


def _none_of_prompts(**given: object) -> None:
    """Refuse what is for prompts where there are none.

    Raises:
        RuntimeInputError: There is such an argument.
    """
    for name in (name for name, value in given.items() if value is not None):
        raise RuntimeInputError(f"{name} is for prompts, and there are none: give what the processor returns")


def _default_context(rows: int, config: PreTrainedConfig) -> int:
    """Room for all rows and some words, but no more than a model has positions."""
    wanted = -(-(rows + _WORDS) // 128) * 128
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min(wanted, most) if isinstance(most, int) else wanted
