"""Passes from other packages: found by their entry points, and never a reason for the others to fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from backends import find_backend
from qeff_ir import QEFFAutoModelForCausalLM
from qeff_ir.errors import PipelineError
from qeff_ir.passing import base, plugins
from qeff_ir.passing.pipeline import Pipeline
from tests import support

PYPROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "{name}"
version = "1.0"

[project.entry-points."qeff_ir.passes"]
{entry}

[tool.setuptools]
py-modules = ["{module}"]
"""

DOUBLE_NEGATION = '''"""Outside of the repository."""
from dataclasses import dataclass
from typing import ClassVar
from qeff_ir.passing.base import Pass, register

@register
@dataclass(frozen=True, slots=True)
class SignRoundTrip(Pass):
    """Write the sum ``a + b`` as ``a - (-b)``."""
    name: ClassVar[str] = "sign-round-trip"
    limit: int = 2
    def run(self, module, rewriter):
        for node in [n for n in module.graph if n.op_type == "Add"][: self.limit]:
            b = rewriter.at(node)
            rewriter.replace(node, b("Sub", node.inputs[0], b("Neg", node.inputs[1])), "sign")
'''


def install(folder: Path, target: Path, name: str, module: str, entry: str, code: str) -> None:
    """Install a package as pip does it, from sources, offline."""
    folder.mkdir(parents=True)
    (folder / "pyproject.toml").write_text(PYPROJECT.format(name=name, module=module, entry=entry))
    (folder / f"{module}.py").write_text(code)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(target), str(folder)], check=True, capture_output=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two installed plugins: a pass, and one that cannot be imported."""
    root = tmp_path_factory.mktemp("plugins")
    entry = 'sign-round-trip = "sign_round_trip"'
    install(root / "good", root / "site", "sign-round-trip", "sign_round_trip", entry, DOUBLE_NEGATION)
    broken = 'raise ImportError("needs the moon")\n'
    install(root / "bad", root / "site", "bad-plugin", "bad_plugin", 'bad-plugin = "bad_plugin"', broken)
    return root / "site"


@pytest.fixture
def on_path(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
    monkeypatch.setattr(plugins, "BROKEN", {})
    monkeypatch.setattr(plugins, "_DONE", set())
    for name in ("sign_round_trip", "bad_plugin"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_an_installed_pass_of_twenty_lines_is_listed_and_explained(site: Path) -> None:
    assert len(DOUBLE_NEGATION.splitlines()) <= 20
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), *sys.path])}

    def qeff(*words: str) -> tuple[str, str]:
        done = subprocess.run(
            [sys.executable, "-m", "qeff_ir.cli", *words], env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout, " ".join(done.stderr.split())

    listed, warned = qeff("passes")
    assert "\nsign-round-trip\n" in listed
    assert "\ncanonicalize\n" in f"\n{listed}"
    assert "bad-plugin: this plugin cannot be imported" in listed
    assert (
        "the plugin 'bad-plugin' cannot be imported: ImportError: needs the moon "
        "(entry point 'bad-plugin = bad_plugin' of bad-plugin)"
    ) in warned
    explained, _ = qeff("passes", "--explain", "sign-round-trip")
    assert "Write the sum" in explained
    assert "must fire: any number" in explained


@pytest.mark.usefixtures("on_path")
def test_an_installed_pass_runs_with_all_checks() -> None:
    module = support.canonical("llama")
    report = support.apply(module, "sign-round-trip{limit=3}")
    assert report.to_json()["passes"][0]["fired"] == {"sign": 3}
    assert [n.op_type for n in module.graph if n.metadata_props.get("qeff.pass") == "sign-round-trip"] == [
        "Neg",
        "Sub",
    ] * 3
    assert "bad_plugin" not in sys.modules
    assert report.warnings == []  # the other plugin was not even looked at


@pytest.mark.usefixtures("on_path")
def test_a_pass_whose_code_has_changed_makes_another_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QEFF_HOME", str(tmp_path / "home"))
    monkeypatch.syspath_prepend(str(tmp_path))
    cached: list[bool] = []
    for ending in ("", "", "# Another version.\n"):
        (tmp_path / "sign_round_trip.py").write_text(DOUBLE_NEGATION + ending)
        model = QEFFAutoModelForCausalLM._opened(support.Lowered("llama"))
        model.compile(target="onnxruntime", pipeline=find_backend("onnxruntime").pipeline + ",sign-round-trip")
        cached.append(model.package.cached)
    assert cached == [False, True, False]


@pytest.mark.usefixtures("on_path")
def test_a_broken_plugin_is_named_where_it_is_wanted() -> None:
    with (
        pytest.warns(UserWarning, match="the plugin 'bad-plugin' cannot be imported"),
        pytest.raises(PipelineError) as error,
    ):
        Pipeline.parse("canonicalize,bad-plugin")
    assert str(error.value) == (
        "there is no pass 'bad-plugin'; its plugin cannot be imported: ImportError: needs the moon "
        "(entry point 'bad-plugin = bad_plugin' of bad-plugin)\n  canonicalize,bad-plugin\n               ^"
    )
    assert support.apply(support.canonical("llama"), "unflatten").warnings == [
        "plugin 'bad-plugin': ImportError: needs the moon (entry point 'bad-plugin = bad_plugin' of bad-plugin)"
    ]
