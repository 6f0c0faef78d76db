"""The Auto classes with adapters: switch, mix, add and remove them without compiling again."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from backends import find_backend
from qeff_ir.adapters.bank import AdapterBank
from qeff_ir.adapters.fit import fit, package_weights
from qeff_ir.adapters.folder import CONFIG_FILE, Adapter, open_adapter
from qeff_ir.adapters.memory import AdaptedMemorySource
from qeff_ir.adapters.targets import ALL_LINEAR, regex
from qeff_ir.auto import QEFFAutoModelForCausalLM
from qeff_ir.compiler import choose_target
from qeff_ir.errors import AdapterError, RuntimeInputError
from qeff_ir.frontend.source import FolderSource, Source, open_source
from qeff_ir.passing.pipeline import Pipeline

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from qeff_ir.runtime.generation import SessionLM

_DEFAULT_SLOTS = 4
_DEFAULT_RANK = 16
Mode = Literal["slots", "single"]
Bias = Literal["none", "targets", "all"]


class QEffAutoPeftModelForCausalLM(QEFFAutoModelForCausalLM):
    """A causal LM and its LoRA adapters.

        model = QEffAutoPeftModelForCausalLM.from_pretrained("my-adapter", adapter_name="sub")
        model.load_adapter("other-adapter", "mul")
        model.compile(num_cores=16, adapter_slots=4, max_lora_rank=32)
        model.generate(prompts=[...], tokenizer=tokenizer, adapters=["sub", "mul", None])

    After `compile`, adapters are loaded, set, disabled and deleted in the running session; none of it compiles again.

    Args:
        model: The base model, a transformers causal LM in memory, which stays unchanged.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self._start()

    def _start(self) -> None:
        self._adapters: dict[str, Adapter] = {}
        self._merged: list[Path] = []
        self._active: str | None = None
        self._bank: AdapterBank | None = None
        self._kept: list[Any] = []

    @classmethod
    def _with_source(cls, source: Source | None) -> QEffAutoPeftModelForCausalLM:
        self = cls.__new__(cls)
        self._source, self._compiled, self._runner = source, None, None
        self._start()
        return self

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
            finite_adapters: Return a `qeff_ir.auto_lora.QEffAutoLoraModelForCausalLM` instead.
            kwargs: As for `QEFFAutoModelForCausalLM.from_pretrained`.

        Raises:
            AdapterError: The adapter cannot be read, or is of a kind that is not supported.
            ModelLoadError: There is no such base model, or it cannot be read.
        """
        _check_name(adapter_name)
        adapter = open_adapter(pretrained_model_name_or_path, **kwargs)
        base = str(base_model) if base_model is not None else _base_of(adapter)
        if finite_adapters:
            from qeff_ir.auto_lora import QEffAutoLoraModelForCausalLM

            cls = QEffAutoLoraModelForCausalLM
        self = cls._with_source(open_source(base, trust_remote_code=trust_remote_code))
        self._adapters[adapter_name] = adapter
        self._active = adapter_name
        return self

    @classmethod
    def from_package(
        cls, folder: str | Path, *, checkpoint: str | Path | Source | None = None
    ) -> QEffAutoPeftModelForCausalLM:
        """Open a compiled package; adapters can be loaded into it, and it cannot be compiled again.

        Args:
            folder: The package.
            checkpoint: See `QEFFAutoModelForCausalLM.from_package`.

        Raises:
            PackageError: The folder is no whole package of this version.
            ModelLoadError: There is no such checkpoint.
        """
        self = cls._with_source(None)
        opened = QEFFAutoModelForCausalLM.from_package(folder, checkpoint=checkpoint)
        self._compiled, self._checkpoint = opened.package, opened._checkpoint
        return self

    @property
    def adapters(self) -> list[str]:
        """Names of the loaded adapters, in the order of loading."""
        return list(self._adapters)

    @property
    def active_adapter(self) -> str | None:
        """The adapter of all rows that `generate` is told nothing else of; `None` for the base model."""
        return self._active

    def load_adapter(
        self, adapter: str | Path, adapter_name: str, *, check_base_model: bool = True, **hub: Any
    ) -> None:
        """Load one more adapter; into the running session when there is one.

        Ranks and targets may differ from those of other adapters. Before `compile`, every adapter is fine; afterwards,
        one that fits the compiled model. The active adapter stays.

        Args:
            adapter: Folder or hub id.
            adapter_name: What to call it; a loaded adapter of that name is replaced.
            check_base_model: Refuse an adapter that says it is of another base model.
            hub: ``revision``, ``cache_dir``, ``token``, ``local_files_only`` for the hub.

        Raises:
            AdapterError: It cannot be read, is not supported, or does not fit; everything else goes on as before.
        """
        _check_name(adapter_name)
        found = open_adapter(adapter, **hub)
        if check_base_model:
            self._check_base(adapter_name, found)
        if self._bank is not None:
            self._bank.add(adapter_name, found)
        elif self._compiled is not None:
            self._check_fits({**self._adapters, adapter_name: found}, [adapter_name])
        self._adapters[adapter_name] = found

    def set_adapter(self, adapter_name: str) -> None:
        """Make an adapter the one of all rows that `generate` is told nothing else of.

        Raises:
            AdapterError: There is no such adapter.
        """
        self._known(adapter_name)
        self._active = adapter_name

    def disable_adapter(self) -> contextlib.ExitStack:
        """Answer as the base model from now on; as a context manager, until the end of the block (as in PEFT)."""
        before = self._active
        self._active = None
        stack = contextlib.ExitStack()
        stack.callback(setattr, self, "_active", before)
        return stack

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter, and free its slot; when it was the active one, the base model answers.

        Raises:
            AdapterError: There is no such adapter.
        """
        self._known(adapter_name)
        if self._bank is not None and self._bank.holds(adapter_name):
            if not self._bank.single:  # what comes into the slot next is not for rows that had this one
                ids = self.runner().decoder.lora_ids
                ids[ids == self._bank.slot(adapter_name)] = 0
            self._bank.remove(adapter_name)
        del self._adapters[adapter_name]
        if self._active == adapter_name:
            self._active = None

    def merge_adapter(self, adapter_names: Sequence[str] | str | None = None) -> None:
        """Make adapters a part of the base model; takes effect with the next `compile`, when weights are written.

        Args:
            adapter_names: The adapters, the active one by default. They stop being adapters.

        Raises:
            AdapterError: There is no such adapter, or the model was opened from a package.
        """
        if self._source is None:
            raise AdapterError("a model opened from a package cannot be compiled again, so nothing is merged into it")
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        names = [self._active] if names is None and self._active else list(dict.fromkeys(names or ()))
        for name in names:
            self._known(name)
        if not names:
            raise AdapterError("no adapter is active: name those to merge")
        for name in names:
            self._merged.append(self._adapters.pop(name).folder)
        if self._active in names:
            self._active = None
        self._compiled = self._runner = self._bank = None

    def compile(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        *,
        adapter_slots: int | None = None,
        max_lora_rank: int | None = None,
        lora_targets: str | None = None,
        lora_bias: Bias | None = None,
        lora_mode: Mode = "slots",
        target: str = "auto",
        pipeline: str | None = None,
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
            target: See there.
            pipeline: See there; the passes for adapters are put in unless it has them.
            kwargs: See there.

        Raises:
            AdapterError: A loaded adapter does not fit what was asked for.
            QeffError: See `qeff_ir.compiler.compile_model`.
        """
        target, _ = choose_target(target)
        steps = Pipeline.parse(pipeline or find_backend(target).pipeline)
        if not any(item.name == "lora" for item in steps.passes):
            step = self._step(adapter_slots, max_lora_rank, lora_targets, lora_bias, lora_mode, target)
            steps = steps.insert_after("last-logits", step)
        for folder in self._merged:
            from passes.merge_lora import MergeLora, adapter_digest

            merge = MergeLora(adapter=str(folder.resolve()), digest=adapter_digest(folder)[:16])
            steps = steps.insert_before("last-logits", merge)
        before = self._compiled, self._runner, self._bank
        try:
            result = super().compile(target=target, pipeline=str(steps), **kwargs)
            self._check_fits(self._adapters, list(self._adapters))
        except BaseException:
            self._compiled, self._runner, self._bank = before
            raise
        self._runner = self._bank = None
        return result

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
        runner = self.runner()
        texts = [prompts] if isinstance(prompts, str) else prompts
        ids = kwargs.get("input_ids") if inputs is None else inputs
        given = len(texts) if texts is not None else 0 if ids is None else len(ids)
        if adapters is None or isinstance(adapters, str):
            names = [adapters if adapters is not None else self._active] * given
        else:
            names = list(adapters)
        if len(names) != given:
            raise RuntimeInputError(f"there are {len(names)} adapters for {given} rows: name one for each")
        slots = self._slots(names)
        if texts is not None and tokenizer is not None:
            from qeff_ir.runtime.texts import generate_texts

            return generate_texts(runner, list(texts), tokenizer, kwargs, slots)
        if texts is None and slots and runner.decoder.batch_size % len(slots) == 0:
            runner.decoder.lora_ids[:] = np.repeat(slots, runner.decoder.batch_size // len(slots))  # copies of each row
        return super().generate(inputs, prompts=prompts, tokenizer=tokenizer, **kwargs)

    def use_adapters(self, adapters: Sequence[str | None]) -> None:
        """Give each row of the compiled batch its adapter, from the next run of the session on; `generate` does so too.

        Args:
            adapters: One name for each row, `None` for the base model.

        Raises:
            AdapterError: There is no such adapter, or the model is compiled for one adapter at a time.
            RuntimeInputError: There are not as many names as rows.
        """
        decoder = self.runner().decoder
        if len(adapters) != decoder.batch_size:
            raise RuntimeInputError(
                f"there are {len(adapters)} adapters for {decoder.batch_size} rows: name one for each"
            )
        decoder.lora_ids[:] = self._slots(list(adapters))

    def runner(self, threads: int | None = None) -> SessionLM:
        """The session that `generate` uses, with the loaded adapters in it; opened on first use."""
        runner = super().runner(threads)
        if self._bank is None:
            bank = AdapterBank(runner.decoder.session, self._base_weights())
            for name, adapter in self._adapters.items() if not bank.single else ():
                bank.add(name, adapter)
            self._bank = bank
        return runner

    def _slots(self, names: list[str | None]) -> list[int]:
        """The slot of each row; with one adapter at a time, puts it in."""
        self.runner()
        assert self._bank is not None
        names = [None if name == "base" else name for name in names]  # the incumbent's name of the base model
        for name in names:
            if name is not None:
                self._known(name)
        if not self._bank.single:
            return [0 if name is None else self._bank.slot(name) for name in names]
        if len(set(names)) > 1:
            raise AdapterError("the model is compiled for one adapter at a time: compile with lora_mode='slots' to mix")
        if names:
            self._bank.put(names[0], None if names[0] is None else self._adapters[names[0]])
        return [0 for _ in names]

    def _step(
        self,
        slots: int | None,
        rank: int | None,
        targets: str | None,
        bias: Bias | None,
        mode: Mode,
        target: str,
    ) -> Any:
        from passes.lora import Lora

        loaded = list(self._adapters.values())
        paths = dict.fromkeys(path for adapter in loaded for path in adapter.layers)
        if bias is None:
            whole = any(adapter.biases.keys() - paths.keys() for adapter in loaded)
            some = any(a.biases or any(f.b_bias for f in a.layers.values()) for a in loaded)
            bias = "all" if whole else "targets" if some else "none"
        for name, value in (("adapter_slots", slots), ("max_lora_rank", rank)):
            if value is not None and (type(value) is not int or value < 1):
                raise AdapterError(f"{name} is {value!r}: give a whole number of at least 1")
        return Lora(
            mode=mode,
            n=slots or max(_DEFAULT_SLOTS, len(loaded)),
            rank=rank or max((adapter.rank for adapter in loaded), default=_DEFAULT_RANK),
            targets=targets or regex(paths) or ALL_LINEAR,
            bias=bias,
            retained=target == "ai100",
        )

    def _known(self, name: str) -> None:
        if not isinstance(name, str) or name not in self._adapters:  # pyright: ignore[reportUnnecessaryIsInstance]
            there = f"there are {', '.join(self._adapters)}" if self._adapters else "there are none"
            raise AdapterError(f"there is no adapter '{name}' ({there}): load it first")

    def _check_fits(self, adapters: dict[str, Adapter], names: list[str]) -> None:
        """Refuse adapters that the compiled package cannot take, without opening it."""
        from qeff_ir.snapshot import load_module

        inputs = load_module(self._onnx()).adapters
        slots = [item.shape[0] - 1 for item in inputs if item.slots]
        if slots and len(adapters) > slots[0]:
            raise AdapterError(
                f"{len(adapters)} adapters do not fit {slots[0]} slots: delete one, or compile with "
                f"adapter_slots={len(adapters)} or more"
            )
        for name in names:
            fit(name, adapters[name], inputs, self._base_weights())

    def _check_base(self, name: str, adapter: Adapter) -> None:
        """Compare what an adapter says of its base model with what the base model says of itself, where both do.

        A package does not say: its configuration only knows the package's own folder.
        """
        if self._source is None:
            return
        said = adapter.base.rstrip("/")
        own = {str(getattr(self.config, "_name_or_path", "") or "").rstrip("/")}
        if isinstance(self._source, FolderSource):
            own |= {str(self._source.folder), str(self._source.folder.resolve())}
        own.discard("")
        if not said or not own:
            return
        last = {Path(known).name for known in own}
        if said not in own and Path(said).name not in last and _relative(adapter) not in own:
            raise AdapterError(
                f"adapter '{name}' is of the base model {said}, this one is {' or '.join(sorted(own))}: pass "
                "check_base_model=False if they are the same"
            )

    def _onnx(self) -> Path:
        return next(iter(sorted(self.package.folder.glob("*.onnx"))))

    def _base_weights(self) -> Any:
        return package_weights(self._onnx())


class QEffPeftModelForCausalLM(QEffAutoPeftModelForCausalLM):
    """The same for a `peft.PeftModelForCausalLM` in memory, whose adapters are all loaded.

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
        self._source, self._compiled, self._runner = AdaptedMemorySource(model), None, None
        self._start()
        kept = tempfile.TemporaryDirectory(prefix="qeff-adapters-")
        self._kept.append(kept)
        model.save_pretrained(kept.name, selected_adapters=list(model.peft_config))
        for name in model.peft_config:
            _check_name(name)
            folder = Path(kept.name) / ("" if name == "default" else name)
            self._adapters[name] = open_adapter(folder)
        active = model.active_adapter
        self._active = active if active in self._adapters else None


def _check_name(name: str) -> None:
    if not isinstance(name, str) or name in ("", "base"):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise AdapterError(
            f"an adapter cannot be called {name!r}: it needs a name, and 'base' is that of the base model"
        )


def _base_of(adapter: Adapter) -> str:
    """Name of the base model; a path that starts with a dot is one from the adapter's folder."""
    if not adapter.base:
        raise AdapterError(f"{adapter.folder / CONFIG_FILE} does not name its base model: pass base_model=")
    return _relative(adapter) or adapter.base


def _relative(adapter: Adapter) -> str | None:
    if not adapter.base.startswith("."):
        return None
    return str((adapter.folder / adapter.base).resolve())
