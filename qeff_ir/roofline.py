"""The least time that a device can take: it reads every byte once and does every multiply-add, one beside the other.

See S. Williams, A. Waterman, D. Patterson, "Roofline: an insightful visual performance model", CACM 52(4), 2009.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from qeff_ir.cost import Cost
from qeff_ir.errors import CompileError


@dataclass(frozen=True)
class Device:
    """A device, as a data file describes it; `None` for what has no source.

    Attributes:
        name: Its name.
        memory_gb: Memory for weights and states, in 10^9 bytes.
        bandwidth_gb_s: Of that memory, in 10^9 bytes per second.
        tera_multiply_adds: At the precision of the graph on the device, in 10^12 per second.
        sources: Where each figure comes from.
    """

    name: str
    memory_gb: float | None
    bandwidth_gb_s: float | None
    tera_multiply_adds: float | None
    sources: dict[str, str]


@dataclass(frozen=True)
class Roofline:
    """What a device can reach at best; `None` where its description lacks a figure.

    Attributes:
        fits: Whether weights and states fit its memory.
        first_token_s: Seconds to the first token of a prompt.
        tokens_per_s: Decoded tokens per second, all rows together.
    """

    fits: bool | None
    first_token_s: float | None
    tokens_per_s: float | None


def read_device(file: Path) -> Device:
    """Read a description.

    Raises:
        CompileError: The file is none.
    """
    known = {f.name for f in fields(Device)}
    try:
        data: Any = json.loads(file.read_text())
        device = Device(**data)
        figures: list[Any] = [device.memory_gb, device.bandwidth_gb_s, device.tera_multiply_adds]
        if any(n is not None and (isinstance(n, bool) or not isinstance(n, int | float) or n <= 0) for n in figures):
            raise ValueError("a figure is not a positive number")
    except (OSError, ValueError, TypeError) as error:
        raise CompileError(
            f"{file} is no description of a device ({error}): write a JSON object with {', '.join(sorted(known))}"
        ) from error
    return device


def seconds(cost: Cost, device: Device) -> float | None:
    """The least time of one run, or `None` when the device's figures are not known."""
    if device.bandwidth_gb_s is None or device.tera_multiply_adds is None:
        return None
    moved = (cost.weight_bytes + cost.state_bytes + cost.written_bytes) / (device.bandwidth_gb_s * 1e9)
    return max(moved, cost.multiply_adds / (device.tera_multiply_adds * 1e12))


def roofline(prefill: Cost, decode: Cost, device: Device, prompt: int, batch: int, *, devices: int = 1) -> Roofline:
    """What some equal devices reach when each takes a part of every tensor, at no cost of sharing.

    Args:
        prefill: Cost of one prefill run.
        decode: Cost of one decode run.
        device: One of them.
        prompt: Tokens of the prompt of each row.
        batch: Rows of a run.
        devices: How many there are.
    """
    runs = math.ceil(prompt / (prefill.tokens // batch))
    first, step = seconds(prefill, device), seconds(decode, device)
    memory = device.memory_gb
    return Roofline(
        None if memory is None else decode.resident_bytes <= memory * 1e9 * devices,
        None if first is None else runs * first / devices,
        None if step is None else batch * devices / step,
    )
