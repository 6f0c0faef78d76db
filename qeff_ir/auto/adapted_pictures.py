"""`QEffAutoPeftModelForImageTextToText`: adapters of the language model of pictures and text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from backends import find_backend
from qeff_ir.adapters.folder import Adapter
from qeff_ir.adapters.step import Bias, Mode
from qeff_ir.auto.adapted import AdaptedModel, open_with_base, rows_of
from qeff_ir.auto.arguments import check_compile_arguments
from qeff_ir.auto.image_text import QEFFAutoModelForImageTextToText
from qeff_ir.auto.qaic_config import loaded
from qeff_ir.compiler import Compiled, Pipelines, choose_target
from qeff_ir.errors import AdapterError
from qeff_ir.frontend.picture_source import PictureSource
from qeff_ir.ir.sources import sources_of
from qeff_ir.package import MAIN, program_folder

if TYPE_CHECKING:
    import torch

    from qeff_ir.arrays import Array
    from qeff_ir.auto.picture_runner import PictureRunner  # noqa: F401  # named in the bases


class QEffAutoPeftModelForImageTextToText(
    AdaptedModel[PictureSource, "PictureRunner"], QEFFAutoModelForImageTextToText
):
    """A model of pictures and text, and LoRA adapters of its language model.

        model = QEffAutoPeftModelForImageTextToText.from_pretrained("my-adapter", adapter_name="short")
        model.compile(prefill_seq_len=128, ctx_len=2048, image_size=(336, 336), adapter_slots=4)
        model.generate(prompts=[...], images=[...], processor=processor, adapters=["short", None])

    See `qeff_ir.auto.adapted.AdaptedModel` for what holds after `compile`. An adapter that changes the encoder is
    refused: pictures are encoded once for all rows and adapters. `merge_adapter` is for the language model too.

    Args:
        model: See `QEFFAutoModelForImageTextToText`.
        processor: See there.
        kv_offload: See there.
    """

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        pretrained_model_name_or_path: str | Path,
        adapter_name: str = "default",
        *,
        base_model: str | Path | None = None,
        kv_offload: bool = True,
        trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> Self:
        """Open an adapter and the base model that its configuration names; no weight is loaded.

        Args:
            pretrained_model_name_or_path: Folder or hub id of the adapter.
            adapter_name: What to call it.
            base_model: Folder or hub id of the base model, where the adapter's own word for it does not lead there.
            kv_offload: See `QEFFAutoModelForImageTextToText.from_pretrained`.
            trust_remote_code: Whether code that comes with the base model may run.
            kwargs: As there; ``revision`` is the adapter's.

        Raises:
            AdapterError: The adapter cannot be read, or is of a kind that is not supported.
            ModelLoadError: There is no such base model, or it cannot be read.
        """
        rest, asked = loaded(kwargs)
        adapter, base, hub = open_with_base(pretrained_model_name_or_path, adapter_name, base_model, rest)
        self = super().from_pretrained(base, kv_offload=kv_offload, trust_remote_code=trust_remote_code, **hub)
        return self._asking(asked)._begin_with(adapter_name, adapter)

    def compile(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        *,
        adapter_slots: int | None = None,
        max_lora_rank: int | None = None,
        lora_targets: str | None = None,
        lora_bias: Bias | None = None,
        lora_mode: Mode = "slots",
        target: str = "auto",
        pipeline: Pipelines = None,
        **kwargs: Any,
    ) -> dict[str, str] | str:
        """Compile with branches for adapters in the language model.

        Args:
            adapter_slots: See `qeff_ir.auto.adapters.QEffAutoPeftModelForCausalLM.compile`, as for the next four.
            max_lora_rank: See there.
            lora_targets: See there.
            lora_bias: See there.
            lora_mode: See there.
            target: See `QEFFAutoModelForImageTextToText.compile`.
            pipeline: See there, of the language model where it is not a mapping; the passes for adapters are put in
                unless it has them.
            kwargs: See there.

        Raises:
            AdapterError: A loaded adapter does not fit what was asked for.
            QeffError: See `qeff_ir.compiler.compile_model`.
        """
        check_compile_arguments({"target": target, "pipeline": pipeline, **kwargs})
        target, _ = choose_target(target)
        with self._compiling(
            target, pipeline,
            slots=adapter_slots, rank=max_lora_rank, targets=lora_targets, bias=lora_bias, mode=lora_mode,
        ) as steps:  # fmt: skip
            return super().compile(target=target, pipeline=steps, **kwargs)

    def _check_fits(self, package: Compiled, adapters: dict[str, Adapter], names: list[str]) -> None:
        """Tell of an adapter that changes an encoder, then as for all others."""
        from qeff_ir.ir.snapshot import load_module

        backend = find_backend(package.manifest.target)
        for program in (program for program in package.manifest.programs if program != MAIN):
            graph = load_module(backend.model_file(program_folder(package.folder, program))).graph
            layers = {path for node in graph for path in sources_of(node)}
            for name in names:
                if changed := sorted(layers & adapters[name].layers.keys()):
                    raise AdapterError(
                        f"adapter '{name}' changes {changed[0]}, a layer of the encoder: only adapters of the language "
                        "model are supported, so train one without it (PEFT's exclude_modules)"
                    )
        super()._check_fits(package, adapters, names)

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        *,
        prompts: Sequence[str] | str | None = None,
        images: Any = None,
        processor: Any = None,
        resize: bool = False,
        adapters: Sequence[str | None] | str | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `QEFFAutoModelForImageTextToText.generate`, with one adapter for each row.

        Args:
            inputs: See there.
            prompts: See there.
            images: See there.
            processor: See there.
            resize: See there.
            adapters: Name of each row's or prompt's adapter, `None` for the base model; one name is for all. The active
                adapter by default.
            kwargs: See there.

        Raises:
            AdapterError: There is no such adapter, or the model is compiled for one adapter at a time.
            RuntimeInputError: There are not as many adapters as rows; see there for the rest.
        """
        texts = self._texts(inputs, prompts, images, processor, resize=resize)
        ids = kwargs.get("input_ids") if inputs is None else inputs
        with self._request(adapters, rows_of(ids, texts)) as (runner, slots):
            if texts is not None:
                return runner.answer(texts, images, processor, kwargs, resize=resize, lora_ids=slots)
            self._give(runner, slots)
            return runner.generate(inputs, kwargs)

    def score(
        self,
        *,
        tokens: Sequence[int | str],
        prompts: Sequence[str] | str | None = None,
        images: Any = None,
        processor: Any = None,
        resize: bool = False,
        adapters: Sequence[str | None] | str | None = None,
        **kwargs: Any,
    ) -> Array:
        """As `QEFFAutoModelForImageTextToText.score`, with one adapter for each row.

        Args:
            tokens: See there.
            prompts: See there.
            images: See there.
            processor: See there.
            resize: See there.
            adapters: As for `generate`.
            kwargs: See there.

        Raises:
            AdapterError: As for `generate`.
            RuntimeInputError: There are not as many adapters as rows; see there for the rest.
        """
        from qeff_ir.runtime.read_out import shares

        texts = self._read_texts(prompts, images, kwargs, resize=resize)
        with self._request(adapters, rows_of(kwargs.get("input_ids"), texts)) as (runner, slots):
            runner.decoder.check_scores()
            logits = self._last(runner, texts, images, processor, kwargs, resize=resize, lora_ids=slots)
        return shares(logits, tokens, getattr(processor, "tokenizer", None))
