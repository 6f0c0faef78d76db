"""The Auto classes of causal LMs with adapters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qeff_ir.adapters.step import Bias, Mode
from qeff_ir.auto.adapted import AdaptedModel, open_with_base, rows_of
from qeff_ir.auto.arguments import check_compile_arguments
from qeff_ir.auto.causal_lm import QEFFAutoModelForCausalLM
from qeff_ir.auto.qaic_config import loaded
from qeff_ir.compiler import Pipelines, choose_target
from qeff_ir.frontend.source import Source, open_source

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedTokenizerBase
    from transformers.generation.continuous_batching.requests import GenerationOutput

    from qeff_ir.arrays import Array
    from qeff_ir.runtime.generation import SessionLM  # noqa: F401  # named in the bases


class QEffAutoPeftModelForCausalLM(AdaptedModel[Source, "SessionLM"], QEFFAutoModelForCausalLM):
    """A causal LM and its LoRA adapters.

        model = QEffAutoPeftModelForCausalLM.from_pretrained("my-adapter", adapter_name="sub")
        model.load_adapter("other-adapter", "mul")
        model.compile(num_cores=16, adapter_slots=4, max_lora_rank=32)
        model.generate(prompts=[...], tokenizer=tokenizer, adapters=["sub", "mul", None])

    See `qeff_ir.auto.adapted.AdaptedModel` for what holds after `compile`.

    Args:
        model: The base model, a transformers causal LM in memory, which stays unchanged.
    """

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        adapter_name: str = "default",
        *,
        base_model: str | Path | None = None,
        trust_remote_code: bool = False,
        finite_adapters: bool = False,
        **kwargs: Any,
    ) -> QEffAutoPeftModelForCausalLM:
        """Open an adapter and the base model that its configuration names; no weight is loaded.

        Args:
            pretrained_model_name_or_path: Folder or hub id of the adapter.
            adapter_name: What to call it.
            base_model: Folder or hub id of the base model, where the adapter's own word for it does not lead there.
            trust_remote_code: Whether code that comes with the base model may run.
            finite_adapters: Return a `qeff_ir.auto.finite_adapters.QEffAutoLoraModelForCausalLM` instead.
            kwargs: As for `QEFFAutoModelForCausalLM.from_pretrained`; ``revision`` is the adapter's.

        Raises:
            AdapterError: The adapter cannot be read, or is of a kind that is not supported.
            ModelLoadError: There is no such base model, or it cannot be read.
        """
        rest, asked = loaded(kwargs)
        adapter, base, hub = open_with_base(pretrained_model_name_or_path, adapter_name, base_model, rest)
        if finite_adapters:
            from qeff_ir import QEffAutoLoraModelForCausalLM

            cls = QEffAutoLoraModelForCausalLM
        self = cls._opened(open_source(base, trust_remote_code=trust_remote_code, **hub))
        return self._asking(asked)._begin_with(adapter_name, adapter)

    def compile(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        *,
        adapter_slots: int | None = None,
        max_lora_rank: int | None = None,
        lora_targets: str | None = None,
        lora_bias: Bias | None = None,
        lora_mode: Mode = "slots",
        bake_adapters: bool = False,
        target: str = "auto",
        pipeline: Pipelines = None,
        **kwargs: Any,
    ) -> str:
        """Compile the base model with branches for adapters; see `QEFFAutoModelForCausalLM.compile` for the rest.

        Args:
            adapter_slots: Adapters that fit at a time; 4 by default, or as many as are loaded.
            max_lora_rank: Largest rank; the largest one loaded by default.
            lora_targets: Layers that get a branch, as `passes.lora.Lora` takes them; by default those of the loaded
                adapters, or all linear layers when there is none.
            lora_bias: Biases that get a branch; by default what the loaded adapters need.
            lora_mode: ``slots``: each row has an adapter of its own. ``single``: one for all rows.
            bake_adapters: Make the loaded adapters weights of the package, for hosts that fill ``lora_ids`` and know no
                other input. They are numbered in the order of loading (``adaptername_to_id.json``), and can be neither
                loaded nor deleted any more.
            target: See there.
            pipeline: See there; the passes for adapters are put in unless it has them.
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
            bake=bake_adapters,
        ) as steps:  # fmt: skip
            return super().compile(target=target, pipeline=steps, **kwargs)

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        *,
        prompts: Sequence[str] | str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        adapters: Sequence[str | None] | str | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `QEFFAutoModelForCausalLM.generate`, with one adapter for each row.

        Args:
            inputs: See there.
            prompts: See there.
            tokenizer: See there.
            adapters: Name of each row's or prompt's adapter, `None` for the base model; one name is for all. The active
                adapter by default.
            kwargs: See there.

        Raises:
            AdapterError: There is no such adapter, or the model is compiled for one adapter at a time.
            RuntimeInputError: There are not as many adapters as rows; see there for the rest.
        """
        from qeff_ir.runtime.texts import as_texts

        texts = None if prompts is None else as_texts(prompts)
        ids = kwargs.get("input_ids") if inputs is None else inputs
        with self._request(adapters, rows_of(ids, texts)) as (runner, slots):
            if texts is None:
                self._give(runner, slots)
            return self._answer(runner, inputs, texts, tokenizer, kwargs, slots)

    def generate_batch(
        self,
        inputs: Sequence[Sequence[int]],
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: object = None,
        record_timestamps: bool = False,
        progress_bar: bool = False,
        persistent_manager: bool = False,
        warmup: bool = True,
        *,
        adapters: Sequence[str | None] | str | None = None,
        **kwargs: Any,
    ) -> dict[str, GenerationOutput]:
        """As `QEFFAutoModelForCausalLM.generate_batch`, with one adapter for each row.

        Args:
            inputs: See there.
            generation_config: See there.
            continuous_batching_config: See there.
            record_timestamps: See there.
            progress_bar: See there.
            persistent_manager: See there.
            warmup: See there.
            adapters: As for `generate`.
            kwargs: See there.

        Raises:
            AdapterError: As for `generate`.
            RuntimeInputError: There are not as many adapters as rows; see there for the rest.
        """
        from qeff_ir.runtime.batch_outputs import as_rows, generate_rows

        rows, config = as_rows(inputs), continuous_batching_config
        with self._request(adapters, len(rows)) as (runner, slots):
            return generate_rows(
                runner, rows, generation_config, config, kwargs, timestamps=record_timestamps, adapters=slots
            )

    def score(
        self,
        *,
        tokens: Sequence[int | str],
        prompts: Sequence[str] | str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        adapters: Sequence[str | None] | str | None = None,
    ) -> Array:
        """As `QEFFAutoModelForCausalLM.score`, with one adapter for each row.

        Args:
            tokens: See there.
            prompts: See there.
            tokenizer: See there.
            input_ids: See there.
            attention_mask: See there.
            adapters: As for `generate`.

        Raises:
            AdapterError: As for `generate`.
            RuntimeInputError: There are not as many adapters as rows; see there for the rest.
        """
        from qeff_ir.runtime.read_out import read_out, shares

        rows = self._rows(self.runner(), prompts, tokenizer, input_ids, attention_mask)
        with self._request(adapters, len(rows)) as (runner, slots):
            logits = read_out(runner.decoder, len(rows), lambda batch: [rows[number] for number in batch], slots)
        return shares(logits, tokens, tokenizer)
