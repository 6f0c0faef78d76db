"""`QEffPeftModelForCausalLM`: a PEFT model in memory, compiled with its adapters."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from qeff_ir.adapters.folder import check_name, open_adapter
from qeff_ir.adapters.memory import PeftMemory
from qeff_ir.auto.adapters import QEffAutoPeftModelForCausalLM
from qeff_ir.errors import AdapterError
from qeff_ir.frontend.source import Source


class QEffPeftModelForCausalLM(QEffAutoPeftModelForCausalLM):
    """A `peft.PeftModelForCausalLM` in memory, whose adapters are all loaded.

    Args:
        model: The PEFT model, which stays unchanged.

    Raises:
        AdapterError: It is no PEFT model of a causal LM, an adapter of it is merged, or one is not supported.
    """

    def __init__(self, model: Any) -> None:
        from peft import PeftModelForCausalLM

        if not isinstance(model, PeftModelForCausalLM):
            raise AdapterError(
                f"{type(model).__name__} is no PeftModelForCausalLM: wrap the base model with PEFT first"
            )
        self._open(Source(PeftMemory(model)))
        self._saved = tempfile.TemporaryDirectory(prefix="qeff-adapters-")  # lives as long as the model does
        model.save_pretrained(self._saved.name, selected_adapters=list(model.peft_config))
        for name in model.peft_config:
            check_name(name)
            folder = Path(self._saved.name) / ("" if name == "default" else name)
            self._adapters[name] = open_adapter(folder)
        active = model.active_adapter
        self._active = active if active in self._adapters else None
