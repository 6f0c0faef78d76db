"""The static shapes that a module is compiled for."""

from __future__ import annotations

from backends.options import CompileOptions
from qeff_ir.errors import CompileError
from qeff_ir.ir.module import Module, RunPhase, Specialization
from qeff_ir.ir.ports import ENCODER_CONTEXT, FEATURE_LENGTH


def specialize(module: Module, options: CompileOptions, name: str = "Embedding") -> None:
    """Set the shapes to compile for: one prefill chunk, and one token (only the latter for chunks of one token).

    With ``full_batch_size``, a prefill run has one row, and a decode run has that many (AI 100 contract §4.2). A module
    without a cache gets one specialization for each length, which has the `name`.

    Raises:
        CompileError: The context, or a length, is longer than the model's positions.
    """
    if "ctx_len" not in module.dims:
        module.specializations = _lengths(module, options, name)
        return
    limit = module.dims["ctx_len"].maximum
    if limit is not None and options.ctx_len > limit:
        raise CompileError(
            f"ctx_len={options.ctx_len} is more than the {limit} positions of {module.name}: "
            f"use ctx_len={limit} or less"
        )
    common = {"batch_size": options.batch_size, "ctx_len": options.ctx_len}
    runs: dict[str, tuple[RunPhase, int]] = {"Prefill": ("prefill", options.prefill_seq_len), "Decode": ("decode", 1)}
    if ENCODER_CONTEXT in module.dims:
        module.specializations = _with_encoder(module, common, options.prefill_seq_len)
        return
    if options.prefill_seq_len == 1 and not options.num_speculative_tokens:
        del runs["Prefill"]
    rows = options.full_batch_size
    common["batch_size"] = rows or options.batch_size
    alone = {"batch_size": 1} if rows else {}  # of a prefill run
    module.specializations = [
        Specialization(n, phase, {**common, **(alone if phase == "prefill" else {}), "seq_len": s})
        for n, (phase, s) in runs.items()
    ]


def keep_phases(module: Module, options: CompileOptions) -> None:
    """Keep the specializations of one phase, where only that is asked for.

    It is done after all passes: they have sized the caches for both phases, so that two packages of one model fit.

    Raises:
        CompileError: Drafts are to be verified, and a state of the model cannot go back behind a rejected one.
    """
    longest = max(options.num_speculative_tokens, default=0) + 1
    decode = [s.symbols["seq_len"] for s in module.specializations if s.phase == "decode"]
    if longest > 1 and decode and max(decode) < longest:
        stuck = next((s.input for s in module.states if s.update != "append"), "the model")
        raise CompileError(
            f"num_speculative_tokens is {longest - 1}, and {stuck} keeps no token of its own, so that no draft can be "
            "taken back: leave num_speculative_tokens out"
        )
    phase: RunPhase = "prefill" if options.prefill_only else "decode"
    found = [s for s in module.specializations if s.phase == phase]
    if options.prefill_only is not None and found:  # of runs of one token, there is one phase
        module.specializations = found


def _with_encoder(module: Module, common: dict[str, int], chunk: int) -> list[Specialization]:
    """The specializations of a decoder that has its encoder in its graph: a first run with features, and all others."""
    context, features = (module.dims[name].maximum for name in (ENCODER_CONTEXT, FEATURE_LENGTH))
    assert context is not None and features is not None
    common = {**common, ENCODER_CONTEXT: context}
    return [
        Specialization("Encoder", "prefill", {**common, "seq_len": chunk, FEATURE_LENGTH: features}),
        Specialization("Decode", "decode", {**common, "seq_len": 1, FEATURE_LENGTH: 1}),
    ]


def _lengths(module: Module, options: CompileOptions, name: str) -> list[Specialization]:
    """The specializations of a module without a cache (names as the AI 100 contract's §4.2)."""
    common = {"batch_size": options.batch_size}
    if module.padding is not None and module.padding.one_row and options.batch_size != 1:
        raise CompileError(
            f"batch_size={options.batch_size} is more than the one row that {module.name} takes (without a padding "
            "token, it reads the last column of each): use batch_size=1, or set pad_token_id in its configuration"
        )
    if "seq_len" not in module.dims:
        return [Specialization(name, "forward", common)]
    limit = module.dims["seq_len"].maximum
    lengths = sorted(set(options.seq_len))
    if not lengths:
        raise CompileError(f"{module.name} takes inputs of any length: give seq_len, one or several")
    if limit is not None and lengths[-1] > limit:
        raise CompileError(
            f"seq_len={lengths[-1]} is more than the {limit} positions of {module.name}: use {limit} or less"
        )
    names = [name] if len(lengths) == 1 else [f"{name}_{i}" for i in range(len(lengths))]
    return [Specialization(own, "forward", {**common, "seq_len": n}) for own, n in zip(names, lengths, strict=True)]
