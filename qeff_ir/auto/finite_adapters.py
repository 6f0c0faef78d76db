"""`QEffAutoLoraModelForCausalLM`: the interface that the incumbent's users have for several adapters of one model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qeff_ir.auto.adapters import QEffAutoPeftModelForCausalLM
from qeff_ir.auto.arguments import hub_arguments, model_name
from qeff_ir.auto.qaic_config import loaded
from qeff_ir.frontend.source import open_source

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


class QEffAutoLoraModelForCausalLM(QEffAutoPeftModelForCausalLM):
    """A base model, and adapters that are selected by `prompt_to_adapter_mapping` (AI 100 contract §6.2).

    model = QEffAutoLoraModelForCausalLM.from_pretrained("base-model")
    model.load_adapter("my-adapter", "one")
    model.compile(num_cores=16)
    model.generate(prompts=[...], tokenizer=tokenizer, prompt_to_adapter_mapping=["one", "base"])

    What the incumbent demands of adapters (one rank, one set of targets) does not hold here.
    """

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls, pretrained_model_name_or_path: str | Path, *, trust_remote_code: bool = False, **hub: Any
    ) -> QEffAutoLoraModelForCausalLM:
        """Open the base model, a folder or a hub id.

        Raises:
            ModelLoadError: There is no such model, or it cannot be read.
        """
        name, (rest, asked) = model_name(pretrained_model_name_or_path), loaded(hub)
        source = open_source(name, trust_remote_code=trust_remote_code, **hub_arguments(rest))
        return cls._opened(source)._asking(asked)

    @property
    def active_adapter_to_id(self) -> dict[str, int]:
        """Number of each adapter in ``lora_ids``, from 1 in the order of loading; the base model is 0."""
        if self._held is not None and not self._held.single:
            return {name: self._held.slot(name) for name in self.adapters}
        return {name: number for number, name in enumerate(self.adapters, start=1)}

    @property
    def _default(self) -> str | None:
        return None

    def unload_adapter(self, adapter_name: str) -> None:
        """Forget an adapter; see `delete_adapter`.

        Raises:
            AdapterError: There is no such adapter.
        """
        self.delete_adapter(adapter_name)

    def generate(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        inputs: torch.Tensor | None = None,
        *,
        prompts: Sequence[str] | str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        prompt_to_adapter_mapping: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `QEffAutoPeftModelForCausalLM.generate`.

        Args:
            inputs: See there.
            prompts: See there.
            tokenizer: See there.
            prompt_to_adapter_mapping: Name of each prompt's adapter, ``base`` for the base model, which is the default.
            kwargs: See there.
        """
        adapters = kwargs.pop("adapters", None)
        names = prompt_to_adapter_mapping if prompt_to_adapter_mapping is not None else adapters
        return super().generate(inputs, prompts=prompts, tokenizer=tokenizer, adapters=names, **kwargs)
