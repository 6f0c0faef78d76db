"""What one SDK's compiler takes, as data, and choosing the description that fits the installed SDK."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from qeff_ir.errors import CompileError

ROOT = Path("/opt/qti-aic")
"""Where the SDK installs itself (contract §0)."""

COMPILER_VARIABLE = "QEFF_QAIC_COMPILE"
"""Environment variable that names the compiler to run instead of the installed one."""

FlagType = Literal["flag", "int", "string", "input", "output"]
"""What a compiler flag takes: nothing, a number, a text, a file that is read, a path that is written."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Numbers that a compiler does not go beyond.

    Attributes:
        protobuf_bytes: Largest ONNX file, weights in files of their own not counted.
        cores: Cores of one device.
        devices: Devices that may share a model.
    """

    protobuf_bytes: int
    cores: int
    devices: int


@dataclass(frozen=True)
class Sdk:
    """A target description: what the compiler of one SDK version takes.

    Attributes:
        version: Of the SDK, such as ``1.22``; it holds for later ones up to the next description.
        compiler: File name of the compiler.
        standing_arguments: What every command starts with.
        hardware: Value of ``-aic-hw-version`` by hardware name.
        specializations: Form of the entries of ``specializations.json``.
        opset: Standard ONNX opset.
        types: Element types, as ONNX names them.
        limits: Sizes and counts.
        flags: Flags and what they take, without the leading dash.
        ops: Operators by domain.
        digest: First 16 hex digits of the SHA-256 of the description itself.
    """

    version: str
    compiler: str
    standing_arguments: tuple[str, ...]
    hardware: Mapping[str, str]
    specializations: Literal["named", "flat"]
    opset: int
    types: frozenset[str]
    limits: Limits
    flags: Mapping[str, FlagType]
    ops: Mapping[str, frozenset[str]]
    digest: str


@dataclass(frozen=True, slots=True)
class Installation:
    """What this machine has of an SDK.

    Attributes:
        compiler: The compiler to run; `None` without one.
        apps: Version of the Apps SDK, as its ``apps.xml`` says; `None` without one.
        hardware: ``ai100`` or ``ai200``.
    """

    compiler: Path | None
    apps: str | None
    hardware: str


@functools.cache
def descriptions() -> tuple[Sdk, ...]:
    """All target descriptions, oldest first."""
    folder = resources.files("backends.ai100") / "sdk"
    found = [_parse(entry.read_bytes()) for entry in folder.iterdir() if entry.name.endswith(".json")]
    return tuple(sorted(found, key=lambda s: _order(s.version)))


def description(version: str) -> Sdk:
    """The description that holds for an SDK version: the newest that is not newer, else the oldest."""
    fitting = [s for s in descriptions() if _order(s.version) <= _order(version)]
    return fitting[-1] if fitting else descriptions()[0]


def probe(root: Path = ROOT) -> Installation:
    """Look for a compiler and its SDK.

    Raises:
        CompileError: ``$QEFF_QAIC_COMPILE`` names something that cannot be run.
    """
    return Installation(_compiler(root), _apps_version(root / "versions" / "apps.xml"), _hardware(root))


def choose(installation: Installation) -> Sdk:
    """The description to compile by: that of the SDK's version, else of the compiler's file name, else the newest."""
    if installation.apps is not None:
        return description(installation.apps)
    if installation.compiler is not None:
        named = [s for s in descriptions() if s.compiler == installation.compiler.name]
        if named:
            return named[-1]
    return descriptions()[-1]


def compiler_candidates(root: Path = ROOT) -> list[Path]:
    """Where the compiler of an SDK may lie, newest SDK first."""
    return [root / "exec" / name for name in dict.fromkeys(s.compiler for s in reversed(descriptions()))]


def _compiler(root: Path) -> Path | None:
    override = os.environ.get(COMPILER_VARIABLE)
    if override:
        found = shutil.which(override)
        if found is None:
            raise CompileError(
                f"${COMPILER_VARIABLE} is '{override}', which is not an executable file: correct or unset it"
            )
        return Path(found)
    return next((path for path in compiler_candidates(root) if os.access(path, os.X_OK)), None)


def _apps_version(path: Path) -> str | None:
    try:
        element = next(ElementTree.parse(path).iter("base_version"), None)
    except (OSError, ElementTree.ParseError):
        return None
    return element.text.strip() if element is not None and element.text else None


def _hardware(root: Path) -> str:
    """What `qaic-util` says of the installed cards; ``ai100`` when it says nothing (contract §0)."""
    try:
        found = subprocess.run(
            [root / "tools" / "qaic-util", "-q"], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return "ai100"
    variants = [line.partition(":")[2] for line in found.stdout.splitlines() if "FW IMAGE_VARIANT" in line]
    return "ai200" if any("AIC200" in v for v in variants) else "ai100"


def _parse(text: bytes) -> Sdk:
    data: dict[str, Any] = json.loads(text)
    return Sdk(
        version=data["version"],
        compiler=data["compiler"],
        standing_arguments=tuple(data["standing_arguments"]),
        hardware=data["hardware"],
        specializations=data["specializations"],
        opset=data["opset"],
        types=frozenset(data["types"]),
        limits=Limits(**data["limits"]),
        flags=data["flags"],
        ops={domain: frozenset(names) for domain, names in data["ops"].items()},
        digest=hashlib.sha256(text).hexdigest()[:16],
    )


def _order(version: str) -> tuple[int, ...]:
    """Versions as numbers, major and minor; what is not a number counts as 0."""
    return tuple(int(part) if part.isdigit() else 0 for part in version.split(".")[:2])
