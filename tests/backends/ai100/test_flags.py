from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.ai100 import emit, flags, sdk
from backends.ai100.options import Ai100Options
from qeff_ir.errors import CompileError

NEW, OLD = sdk.description("1.22"), sdk.description("1.20")
KEYS = st.from_regex(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", fullmatch=True)


def resolve(force: bool = False, **given: Any) -> flags.Flags:
    return flags.resolve(Ai100Options(flags=given, force_flags=force), NEW)


@given(KEYS, st.one_of(st.booleans(), st.none(), st.integers(), st.text()))
def test_mapping_is_the_contract(key: str, value: Any) -> None:
    flag = flags.format_flag(key, value)
    if value is False:
        assert flag is None
    elif value is True:
        assert flag == "-" + key.replace("_", "-")
    else:
        assert flag == f"-{key.replace('_', '-')}={value}"


@given(KEYS.filter(lambda k: k.replace("_", "-") not in {n.lower() for n in NEW.flags} | {"compile-only"}))
def test_an_unknown_flag_is_refused_or_forced(key: str) -> None:
    given: dict[str, Any] = {key: 3}
    with pytest.raises(CompileError, match=rf"no flag {key}: (the nearest is \w+|leave it out); force_flags=True"):
        resolve(**given)
    assert resolve(force=True, **given).arguments == (f"-{key.replace('_', '-')}=3",)


def test_the_nearest_flag_is_named() -> None:
    with pytest.raises(CompileError, match="the nearest is aic_enable_depth_first;"):
        resolve(aic_enable_depthfirst=True)


def test_flags_keep_their_order_and_either_spelling() -> None:
    given: dict[str, Any] = {"mos": 2, "aic-enable-depth-first": True, "qpc_crc": False, "aic_num_of_activations": 3}
    assert resolve(**given).arguments == ("-mos=2", "-aic-enable-depth-first", "-aic-num-of-activations=3")


@pytest.mark.parametrize(
    ("key", "value", "takes"),
    [
        ("mos", True, "a whole number"),
        ("mos", "2", "a whole number"),
        ("qpc_crc", 1, "True or False"),
        ("qpc_crc", None, "True or False"),
        ("aic_hw_version", 2, "a text"),
        ("node_precision_info", "/nowhere.yaml", "the path of an existing file"),
        ("mdp_dump_partition_config", "/tmp/dump.json", "a relative path"),
        ("mdp_dump_partition_config", "../dump.json", "a relative path"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(key: str, value: Any, takes: str) -> None:
    with pytest.raises(CompileError, match=f"the flag {key} takes {takes}"):
        resolve(**{key: value})


def test_flags_with_an_option_of_their_own_name_it() -> None:
    with pytest.raises(CompileError, match=r"say num_cores=\.\.\. instead"):
        resolve(aic_num_cores=8)
    with pytest.raises(CompileError, match="leave it out"):
        resolve(retained_state=True)
    with pytest.raises(CompileError, match="leave it out"):
        resolve(custom_io_list_file="x")


def test_files_move_into_the_package(tmp_path: Path) -> None:
    source = tmp_path / "my precision.yaml"
    source.write_text("FP32NodeInstanceNames: []\n")
    found = resolve(node_precision_info=str(source), mdp_load_partition_config=source)
    assert found.arguments == ("-node-precision-info=node_precision_info.yaml",)
    assert found.partition == "mdp_load_partition_config.yaml"
    assert set(found.files.values()) == {source}


def test_hardware_by_sdk() -> None:
    assert resolve(aic_hw_version="ai200").hardware == "ai200"
    with pytest.raises(CompileError, match=r"SDK 1\.20 compiles for ai100, not"):
        flags.resolve(Ai100Options(flags={"aic_hw_version": "ai200"}), OLD)


@pytest.mark.parametrize(
    ("version", "wish", "card", "given"),
    [
        ("1.22", None, "ai100", "ai100"), ("1.22", None, "ai200", "ai200"), ("1.22", "ai200", "ai100", "ai200"),
        ("1.22", "ai100", "ai200", "ai100"), ("1.20", None, "ai100", "2.0"), ("1.20", "ai100", "ai100", "2.0"),
    ],
)  # fmt: skip
def test_the_command_is_for_the_hardware_that_is_asked_for_else_for_the_card(
    version: str, wish: str | None, card: str, given: str
) -> None:
    target = sdk.description(version)
    options = Ai100Options(flags={} if wish is None else {"aic_hw_version": wish})
    argv = emit.command("m.onnx", options, target, flags.resolve(options, target), card, None)
    assert [a for a in argv if a.startswith("-aic-hw-version")] == [f"-aic-hw-version={given}"]


def test_compile_only_is_dropped_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="compile_only is obsolete"):
        assert resolve(compile_only=True).arguments == ()
