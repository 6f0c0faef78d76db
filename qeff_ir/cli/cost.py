"""``qeff cost``: what a package's runs cost, counted on its graph, and what a device could reach with it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qeff_ir.cli.models import program_module
from qeff_ir.cli.tables import grid
from qeff_ir.cli.terminal import line, show, working
from qeff_ir.errors import CompileError

if TYPE_CHECKING:
    from qeff_ir.cost import Cost
    from qeff_ir.package import Manifest
    from qeff_ir.roofline import Device


def command(
    package: Annotated[Path, typer.Argument(help="A compiled package.", show_default=False)],
    device: Annotated[
        str | None, typer.Option(help="standard, pro, ultra, or a JSON file that describes a device.")
    ] = None,
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt, for the time to the first token.", min=1)] = 128,
    program: Annotated[str, typer.Option(help="Which program, of a package of several.", metavar="NAME")] = "main",
    as_json: Annotated[bool, typer.Option("--json", help="Plain data, all of it.")] = False,
) -> None:
    """Count bytes of weights and caches, and multiply-adds, of each specialization of a package."""
    with working("Counting"):
        from backends import find_backend
        from qeff_ir.cost import cost
        from qeff_ir.package import opened

        described = None if device is None else _device(device)
        with opened(package) as manifest:
            module = program_module(package, manifest, program)
            backend = find_backend(manifest.target)
            storage, fixed = backend.storage(manifest.options), backend.ahead_of_time
            costs = [cost(module, item, storage, fixed=fixed) for item in module.specializations]
    if described is not None and not all(item.tokens for item in costs):
        raise CompileError(f"--device tells the time of tokens, and the program '{program}' takes none: leave it out")
    if as_json:
        print(json.dumps([asdict(c) for c in costs], indent=2))
        return
    _show(costs)
    if described is not None:
        _show_roofline(costs, described, manifest, prompt)


def _device(name: str) -> Device:
    from backends import find_backend, preferred
    from qeff_ir.roofline import read_device

    shipped = {device: path for target in preferred() for device, path in find_backend(target).devices().items()}
    if name in shipped:
        return read_device(shipped[name])
    if not Path(name).is_file():
        raise CompileError(f"there is no device '{name}': it is {', '.join(shipped)}, or a file that describes one")
    return read_device(Path(name))


def _show(costs: list[Cost]) -> None:
    rows = ("MB weights", "MB cache", "G multiply-adds", "share")
    table = grid("run", "operator", "nodes", *rows, right=("nodes", *rows))
    for item in costs:
        of = f", {item.tokens} token{'s' if item.tokens > 1 else ''}"
        per = f"{item.name}{of if item.tokens else ''}"
        total = item.multiply_adds
        cache = f"{item.state_bytes / 1e6:,.3f}"
        table.add_row(per, "all", "", f"{item.weight_bytes / 1e6:,.3f}", cache, f"{total / 1e9:,.4f}", "")
        for name, op in item.ops.items():
            if op.multiply_adds or op.weight_bytes:
                share = f"{op.multiply_adds / total:.1%}" if total else "-"
                bytes_, adds = f"{op.weight_bytes / 1e6:,.3f}", f"{op.multiply_adds / 1e9:,.4f}"
                table.add_row("", name.rpartition(".")[2], str(op.nodes), bytes_, "", adds, share)
    show(table)


def _show_roofline(costs: list[Cost], device: Device, manifest: Manifest, prompt: int) -> None:
    from qeff_ir.roofline import roofline

    batch, devices = (
        int(manifest.options["full_batch_size"] or manifest.options["batch_size"]),
        int(manifest.options.get("num_devices", 1)),
    )
    found = roofline(costs[0], costs[-1], device, prompt, batch, devices=devices)
    unknown: list[str] = [
        what
        for what, value in (
            ("memory_gb", device.memory_gb),
            ("bandwidth_gb_s", device.bandwidth_gb_s),
            ("tera_multiply_adds", device.tera_multiply_adds),
        )
        if value is None
    ]
    resident = costs[-1].resident_bytes / 1e9
    many = f"{devices} × {device.name}" if devices > 1 else device.name
    if found.fits is not None:
        line(f"{many}: {resident:.2f} GB of weights and caches {'fit' if found.fits else 'do not fit'}")
    if found.first_token_s is not None and found.tokens_per_s is not None:
        line(f"{many}: at best {1000 * found.first_token_s:.2f} ms to the first token of {prompt}, ")
        line(f"          and {found.tokens_per_s:,.1f} tokens/s")
    if unknown:
        line(f"{many}: no figure with a source for {', '.join(unknown)}; give a file of your own as --device")
