"""What Auto classes with adapters have in common: switch, mix, add and remove them without compiling again."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar, cast

import numpy as np

from backends import find_backend
from qeff_ir.adapters.base_model import base_of, check_base
from qeff_ir.adapters.fit import fit, package_weights
from qeff_ir.adapters.folder import Adapter, check_name, open_adapter
from qeff_ir.adapters.slots import AdapterSlots, BakedSlots, baked_already
from qeff_ir.adapters.step import Bias, Mode, baked, lora_step
from qeff_ir.auto.arguments import hub_arguments, model_name
from qeff_ir.auto.compiled_model import CompiledModel, SourceT
from qeff_ir.compiler import Compiled, Pipelines, chosen
from qeff_ir.errors import AdapterError, RuntimeInputError
from qeff_ir.ir.baked import read_names
from qeff_ir.package import MAIN
from qeff_ir.passing.pipeline import Pipeline
from qeff_ir.reading import path_of
from qeff_ir.runtime.decoder import Decoder


class AdaptedRunner(Protocol):
    """What runs a package whose main program has branches for adapters."""

    @property
    def decoder(self) -> Decoder:
        """That of the main program."""
        ...

    @property
    def running(self) -> bool:
        """Whether ``generate`` is running."""
        ...


RunnerT = TypeVar("RunnerT", bound=AdaptedRunner)


class AdaptedModel(CompiledModel[SourceT, RunnerT]):
    """A model and its LoRA adapters.

    After `compile`, adapters are loaded, set, disabled and deleted in the running session; none of it compiles again.

    Several threads may use one object. A request keeps its adapters from its start to its last token: loading, deleting
    and replacing one in another thread waits for the end of the request that is running. Which adapter is active holds
    for all threads: name them by request (``adapters=``) where threads differ.
    """

    def _open(self, source: SourceT | None) -> None:
        super()._open(source)
        self._adapters: dict[str, Adapter] = {}
        self._merged: list[Path] = []
        self._active: str | None = None
        self._held: AdapterSlots | None = None

    def _begin_with(self, name: str, adapter: Adapter) -> Self:
        """Load the adapter that the model is opened by, and make it the active one."""
        self._adapters[name] = adapter
        self._active = name
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_held": None}  # slots are those of the session

    @property
    def adapters(self) -> list[str]:
        """Names of the loaded adapters, in the order of loading; of a package that has them as weights, all of its."""
        return list(self._baked or self._adapters)

    @property
    def _baked(self) -> dict[str, int]:
        """The number of each adapter that is a weight of the package."""
        return {} if self._compiled is None else read_names(self._compiled.folder)

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
        check_name(adapter_name)
        path_of(adapter, "the adapter", AdapterError)
        found = open_adapter(adapter, **hub)
        if check_base_model and self._source is not None:  # a package only knows its own folder
            check_base(adapter_name, found, self._source)
        with self._between_requests():
            if self._baked:
                raise AdapterError(baked_already(adapter_name))
            if self._held is not None:
                self._held.add(adapter_name, found)
            elif self._compiled is not None:
                self._check_fits(self._compiled, {**self._adapters, adapter_name: found}, [adapter_name])
            self._adapters[adapter_name] = found

    def set_adapter(self, adapter_name: str) -> None:
        """Make an adapter the one of all rows that `generate` is told nothing else of.

        Raises:
            AdapterError: There is no such adapter.
        """
        with self._lock:
            self._known(adapter_name)
            self._active = adapter_name

    def slot_of(self, adapter_name: str) -> int:
        """Number of an adapter's slot in the session, for the jobs of an engine; that of the base model is 0.

        Raises:
            AdapterError: There is no such adapter, or the model is compiled for one adapter at a time.
            PackageError: The model is not compiled.
        """
        with self._lock:
            self.runner()
            held = self._held
            self._known(adapter_name)
        assert held is not None
        if held.single:
            raise AdapterError("the model is compiled for one adapter at a time: compile with lora_mode='slots' to mix")
        return held.slot(adapter_name)

    def disable_adapter(self) -> contextlib.ExitStack:
        """Answer as the base model from now on; as a context manager, until the end of the block.

        As in PEFT, an adapter that the block sets stays the active one.
        """
        with self._lock:
            before, self._active = self._active, None
        stack = contextlib.ExitStack()
        stack.callback(self._enable, before)
        return stack

    def _enable(self, name: str | None) -> None:
        with self._lock:
            if self._active is None and name in self._adapters:  # it may have been deleted since
                self._active = name

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter, and free its slot; when it was the active one, the base model answers.

        Raises:
            AdapterError: There is no such adapter.
        """
        with self._between_requests():
            self._known(adapter_name)
            if self._baked:
                raise AdapterError(baked_already(adapter_name))
            if self._held is not None and self._held.holds(adapter_name):
                if not self._held.single:  # what comes into the slot next is not for rows that had this one
                    ids = self.runner().decoder.lora_ids
                    ids[ids == self._held.slot(adapter_name)] = 0
                self._held.remove(adapter_name)
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
        names = None if adapter_names is None else _names(adapter_names)
        with self._lock:
            names = [self._active] if names is None and self._active else names or []
            for name in names:
                self._known(name)
            names = list(dict.fromkeys(names))
            if not names:
                raise AdapterError("no adapter is active: name those to merge")
            for name in names:
                self._merged.append(self._adapters.pop(name).folder)
            if self._active in names:
                self._active = None
            self._compiled = self._runner = self._held = None

    def _steps(
        self,
        target: str,
        pipeline: Pipeline | str | None,
        merged: Sequence[Path],
        *,
        slots: int | None,
        rank: int | None,
        targets: str | None,
        bias: Bias | None,
        mode: Mode,
        bake: bool = False,
    ) -> Pipeline:
        """The pipeline of the program with adapters; see `lora_step` for what is asked.

        Args:
            target: The target.
            pipeline: Another one than its own, or edits; the passes for adapters are put in unless it has them.
            merged: Adapters that become a part of the weights.
            slots: See there.
            rank: See there.
            targets: See there.
            bias: See there.
            mode: See there.
            bake: Whether the loaded adapters become weights too, each in a slot of its own; see `baked`.

        Raises:
            AdapterError: See there.
        """
        steps = chosen(pipeline, Pipeline.parse(find_backend(target).pipeline))
        with self._lock:
            adapters = dict(self._adapters)
        for folder in merged:
            from passes.merge_lora import MergeLora, adapter_digest

            steps = steps.add(MergeLora(adapter=str(folder.resolve()), digest=adapter_digest(folder)[:16]))
        if any(item.name == "lora" for item in steps.passes):
            return steps
        if bake:
            made = baked(adapters, slots=slots, rank=rank, targets=targets, bias=bias, mode=mode)
            return steps.add(Pipeline(tuple(made)))
        retained, found = find_backend(target).retains_adapters, list(adapters.values())
        step = lora_step(found, slots=slots, rank=rank, targets=targets, bias=bias, mode=mode, retained=retained)
        return steps.add(step)

    @contextlib.contextmanager
    def _compiling(self, target: str, pipeline: Pipelines, **asked: Any) -> Generator[dict[str, Pipeline | str]]:
        """The pipelines by program, that of the main one with passes for adapters, while a package is made by them.

        Args:
            target: The target.
            pipeline: Those that are asked for; one alone is that of the main program.
            asked: See `_steps`.

        Raises:
            AdapterError: Another thread has merged an adapter meanwhile, or see `_steps`.
        """
        given = dict(pipeline) if isinstance(pipeline, Mapping) else {} if pipeline is None else {MAIN: pipeline}
        with self._lock:
            merged = list(self._merged)
        yield {**given, MAIN: self._steps(target, given.get(MAIN), merged, **asked)}
        with self._lock:
            if self._merged != merged:
                self._compiled = self._runner = self._held = None
                raise AdapterError("another thread merged an adapter while the model was compiled: compile it again")

    def _accept(self, made: Compiled) -> None:
        """Take a package; the one before stays when an adapter does not fit.

        Raises:
            AdapterError: A loaded adapter does not fit.
        """
        self._check_fits(made, self._adapters, list(self._adapters))
        super()._accept(made)
        self._held = None

    def _named(self, adapters: Sequence[str | None] | str | None, rows: int, active: str | None) -> list[str | None]:
        """The adapter of each row of a request; the active one by default.

        Raises:
            RuntimeInputError: There are not as many as rows.
        """
        if adapters is None or isinstance(adapters, str):
            return [adapters if adapters is not None else active] * rows
        names = _names(adapters)
        if len(names) != rows:
            raise RuntimeInputError(f"there are {len(names)} adapters for {rows} rows: name one for each")
        return names

    @property
    def _default(self) -> str | None:
        """The adapter of a request that names none."""
        return self._active

    @contextlib.contextmanager
    def _request(self, adapters: Sequence[str | None] | str | None, rows: int) -> Generator[tuple[RunnerT, list[int]]]:
        """The session for one request of this thread, and the slots of its rows; other threads wait until its end.

        Args:
            adapters: Name of each row's adapter, or one for all; the default one by default.
            rows: How many rows there are.

        Raises:
            AdapterError: There is no such adapter, or the model is compiled for one adapter at a time.
            RuntimeInputError: There are not as many adapters as rows, or a request of this thread is running.
        """
        with self._lock:
            runner, held, active = self.runner(), self._held, self._default
        assert held is not None
        names = self._named(adapters, rows, active)
        with runner.decoder.request():
            yield runner, self._slots(held, names)

    def use_adapters(self, adapters: Sequence[str | None]) -> None:
        """Give each row of the compiled batch its adapter, from the next run of the session on; `generate` does so too.

        Between requests, or inside one that is written by hand (`Decoder.request`); where threads share the model, only
        the latter is sure to be the request's own.

        Args:
            adapters: One name for each row, `None` for the base model.

        Raises:
            AdapterError: There is no such adapter, or the model is compiled for one adapter at a time.
            RuntimeInputError: There are not as many names as rows, or `generate` is running in this thread.
        """
        with self._lock:
            runner, held = self.runner(), self._held
        assert held is not None
        decoder, names = runner.decoder, _names(adapters)
        if len(names) != decoder.batch_size:
            raise RuntimeInputError(f"there are {len(names)} adapters for {decoder.batch_size} rows: name one for each")
        by_hand = decoder.turns.mine and not runner.running
        with decoder.turns.join() if by_hand else decoder.request():
            decoder.lora_ids[:] = self._slots(held, names)

    def _open_runner(self, threads: int | None) -> RunnerT:
        """The session, with the loaded adapters in it."""
        runner = super()._open_runner(threads)
        session, numbers = runner.decoder.session, self._baked
        if numbers:
            self._held = BakedSlots(session, numbers)
            return runner
        held = AdapterSlots(session, package_weights(_model_file(self.package)))
        for name, adapter in self._adapters.items() if not held.single else ():
            held.add(name, adapter)
        self._held = held
        return runner

    @contextlib.contextmanager
    def _between_requests(self) -> Generator[None]:
        """The adapters and the session for this thread alone, when the request that is running has ended.

        Raises:
            RuntimeInputError: It is a request of this thread.
        """
        while True:
            runner = self._runner
            with contextlib.nullcontext() if runner is None else runner.decoder.request(), self._lock:
                if self._runner is runner:  # nobody has opened or left one meanwhile
                    if runner is not None:
                        runner.decoder.turns.note(self)  # what was computed with an adapter may be of another now
                    yield
                    return

    def _slots(self, held: AdapterSlots, names: list[str | None]) -> list[int]:
        """The slot of each row; with one adapter at a time, puts it in. The thread has its turn."""
        names = [None if name == "base" else name for name in names]  # the incumbent's name of the base model
        with self._lock:
            for name in names:
                if name is not None:
                    self._known(name)
            if not held.single:
                return [0 if name is None else held.slot(name) for name in names]
            if len(set(names)) > 1:
                raise AdapterError(
                    "the model is compiled for one adapter at a time: compile with lora_mode='slots' to mix"
                )
            if names:
                held.put(names[0], None if names[0] is None else self._adapters[names[0]])
            return [0 for _ in names]

    def _give(self, runner: RunnerT, slots: Sequence[int]) -> None:
        """Give rows of token ids, and the copies of each, their slots."""
        decoder = runner.decoder
        if slots and decoder.batch_size % len(slots) == 0:
            decoder.lora_ids[:] = np.repeat(slots, decoder.batch_size // len(slots))

    def _known(self, name: str) -> None:
        names = self.adapters
        if not isinstance(name, str) or name not in names:  # pyright: ignore[reportUnnecessaryIsInstance]
            there = f"there are {', '.join(names)}" if names else "there are none"
            raise AdapterError(f"there is no adapter '{name}' ({there}): load it first")

    def _check_fits(self, package: Compiled, adapters: dict[str, Adapter], names: list[str]) -> None:
        """Refuse adapters that the compiled package cannot take, without opening it."""
        from qeff_ir.ir.snapshot import load_module

        numbers = read_names(package.folder)
        if numbers:
            new = next((name for name in names if name not in numbers), None)
            if new is not None:
                raise AdapterError(baked_already(new))
            return
        model = _model_file(package)
        inputs = load_module(model).adapters
        slots = max((item.slots for item in inputs), default=0)
        if slots and len(adapters) > slots:
            raise AdapterError(
                f"{len(adapters)} adapters do not fit {slots} slots: delete one, or compile with "
                f"adapter_slots={len(adapters)} or more"
            )
        for name in names:
            fit(name, adapters[name], inputs, package_weights(model))


def open_with_base(
    adapter: str | Path, name: str, base_model: str | Path | None, kwargs: Mapping[str, Any]
) -> tuple[Adapter, str | Path, dict[str, Any]]:
    """An adapter, its base model, and the arguments by which the hub has that.

    Args:
        adapter: Folder or hub id of the adapter.
        name: What to call it.
        base_model: Folder or hub id of the base model; by default what the adapter says.
        kwargs: Of ``from_pretrained``; ``revision`` is the adapter's.

    Raises:
        AdapterError: The adapter cannot be read, or is of a kind that is not supported.
        ModelLoadError: An argument asks for what is not supported.
    """
    check_name(name)
    hub = hub_arguments(kwargs)
    path_of(adapter, "the adapter", AdapterError)
    found = open_adapter(adapter, **hub)
    base = model_name(base_model) if base_model is not None else base_of(found)
    hub.pop("revision", None)  # the adapter's; the base model's stands in the configuration
    if base_model is None and found.config.revision:
        hub["revision"] = found.config.revision
    return found, base, hub


def rows_of(ids: object, texts: Sequence[str] | None) -> int:
    """How many rows a request has; 0 of malformed token ids, which are told where they are read."""
    if texts is not None or isinstance(ids, list | tuple):
        return len(cast("Sequence[Any]", ids if texts is None else texts))
    shape: Sequence[int] = getattr(ids, "shape", ())
    return shape[0] if shape else 0


def _model_file(package: Compiled) -> Path:
    return find_backend(package.manifest.target).model_file(package.folder)


def _names(adapters: object) -> list[Any]:
    """One name, or any number of them, as a list.

    Raises:
        RuntimeInputError: It is something else.
    """
    if isinstance(adapters, str):
        return [adapters]
    if not isinstance(adapters, Iterable) or isinstance(adapters, bytes):
        raise RuntimeInputError(f"adapters is {adapters!r}: give the name of an adapter, or one for each row")
    return list(cast("Iterable[Any]", adapters))
