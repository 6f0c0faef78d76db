"""Linear attention and state-space kernels as one op: a recurrence over tokens that starts from a retained state.

transformers' models call kernels by names that they share, and have a pure PyTorch form of each. All of them are one
recurrence, with ``S`` the state of a head, ``[key width, value width]``::

    S_t = exp(g_t) S_{t-1} + k_t (b_t (v_t - S' k_t))    with the delta rule (S' the decayed state)
    S_t = exp(g_t) S_{t-1} + k_t v_t                     without it
    o_t = q_t S_t

Sources: Mamba (arXiv:2312.00752, equation 2), Mamba-2 (arXiv:2405.21060, section 3), gated delta networks
(arXiv:2412.06464, equation 10); a decay for each key channel is that of arXiv:2510.26692.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Generator
from typing import Any

import torch
from transformers import PreTrainedModel

from qeff_ir.frontend.capture import own_thread
from qeff_ir.frontend.capture.states import CapturingCache

Tensor = torch.Tensor

Current = Callable[[], CapturingCache | None]
"""Gives the cache of the run that is being traced."""


def _run(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor | None, current: Current
) -> tuple[Tensor, Tensor]:
    """The recurrence, from the state that the model asked for last.

    Args:
        q: ``[batch, heads, seq, key width]``.
        k: The same.
        v: ``[batch, heads, seq, value width]``.
        decay: Logarithm of the decay, ``[batch, heads, seq, key width or 1]``.
        beta: Strength of the delta rule, ``[batch, heads, seq, 1]``; `None` for no delta rule.
        current: The cache.

    Returns:
        Outputs ``[batch, heads, seq, value width]`` and the state after the run, ``[batch, heads, key width, value
        width]``.
    """
    cache = current()
    past = cache.next_recurrent() if cache is not None else None
    if past is not None and past.dim() > 4:  # heads of their own call, stacked on axis 1
        past = past[:, cache.recurrent_calls - 1] if cache is not None else None
    if past is None:
        past = v.new_zeros((v.shape[0], v.shape[1], k.shape[3], v.shape[3]))
    positions = cache.position_ids if cache is not None else torch.zeros(v.shape[0], v.shape[2], dtype=torch.long)
    delta = 0.0 if beta is None else 1.0
    beta = torch.ones_like(decay[..., :1]) if beta is None else beta
    return torch.ops.qeff.linear_attention(q, k, v, decay, beta, past, positions, delta)


def _selective_scan(current: Current) -> Callable[..., Any]:
    def scan(
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,  # noqa: N803
        B: Tensor,  # noqa: N803
        C: Tensor,  # noqa: N803
        D: Tensor | None = None,  # noqa: N803
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        **kwargs: Any,
    ) -> Any:
        """``hidden_states``, ``dt``, ``z`` ``[batch, channels, seq]``; ``B``, ``C`` ``[batch, width, seq]``."""
        dt = _step(dt, delta_bias[..., None] if delta_bias is not None else None, delta_softplus)
        decay = A[None, :, None, :] * dt[..., None]
        k, q = (x.transpose(1, 2)[:, None].expand_as(decay) for x in (B, C))
        out, last = _run(q, k, (dt * hidden_states)[..., None], decay, None, current)
        out = out.squeeze(-1)
        if D is not None:
            out = out + hidden_states * D[None, :, None]
        if z is not None:
            out = out * torch.nn.functional.silu(z)
        return (out, last) if return_last_state else out

    return scan


def _chunk_scan(current: Current) -> Callable[..., Any]:
    def scan(
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,  # noqa: N803
        B: Tensor,  # noqa: N803
        C: Tensor,  # noqa: N803
        chunk_size: int = 0,
        D: Tensor | None = None,  # noqa: N803
        dt_bias: Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        return_final_states: bool = False,
        **kwargs: Any,
    ) -> Any:
        """``hidden_states`` ``[batch, seq, heads, width]``; ``dt`` ``[batch, seq, heads]``; ``B`` by group of heads."""
        dt = _step(dt, dt_bias, dt_softplus)
        if tuple(dt_limit) != (0.0, float("inf")):
            dt = dt.clamp(min=dt_limit[0], max=dt_limit[1])
        groups = hidden_states.shape[2] // B.shape[2]
        k, q = (x.repeat_interleave(groups, dim=2).transpose(1, 2) for x in (B, C))
        v = (hidden_states * dt[..., None]).transpose(1, 2)
        out, last = _run(q, k, v, (A * dt).transpose(1, 2)[..., None], None, current)
        out = out.transpose(1, 2)
        if D is not None:
            out = out + hidden_states * D[..., None]
        return (out, last) if return_final_states else out

    return scan


def _delta_rule(current: Current) -> Callable[..., Any]:
    def rule(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        use_qk_l2norm_in_kernel: bool = False,
        **kwargs: Any,
    ) -> Any:
        """All ``[batch, seq, heads, width]``, ``beta`` and a decay ``g`` of whole heads without the width."""
        groups = value.shape[2] // key.shape[2]
        q, k = (x.repeat_interleave(groups, dim=2) if groups > 1 else x for x in (query, key))
        if use_qk_l2norm_in_kernel:
            q, k = (x * torch.rsqrt((x * x).sum(dim=-1, keepdim=True) + 1e-6) for x in (q, k))
        q = q * query.shape[-1] ** -0.5
        decay = g if g.dim() == q.dim() else g[..., None]
        q, k, v, decay, strength = (x.transpose(1, 2) for x in (q, k, value, decay, beta[..., None]))
        out, last = _run(q, k, v, decay, strength, current)
        return out.transpose(1, 2).contiguous(), last

    return rule


def _step(dt: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    dt = dt if bias is None else dt + bias
    return torch.nn.functional.softplus(dt) if softplus else dt


KERNELS: dict[str, Callable[[Current], Callable[..., Any]]] = {
    r"\w*selective_scan": _selective_scan,
    r"\w*chunk_scan": _chunk_scan,
    r"\w*chunk_\w*delta\w*": _delta_rule,
}
"""Names of the kernels in transformers' modelling files, and what stands in for them."""


@contextlib.contextmanager
def replaced(model: PreTrainedModel, current: Current) -> Generator[None]:
    """Let the kernels that the model's code calls be our op, in this thread, for as long as the block lasts."""
    with contextlib.ExitStack() as stack:
        for code in {name: sys.modules.get(name) for name in {type(m).__module__ for m in model.modules()}}.values():
            for name in [] if code is None else [n for n, value in vars(code).items() if callable(value)]:
                made = next((make for pattern, make in KERNELS.items() if re.fullmatch(pattern, name)), None)
                if made is not None:
                    stack.enter_context(own_thread.replaced(code, name, lambda _, made=made: made(current)))
        yield
