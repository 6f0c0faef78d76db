"""What comes from outside is a plain name, a regular file inside its root, and JSON of bounded depth, or refused."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qeff_ir.errors import ModelLoadError, PackageError
from qeff_ir.package import MAIN, Manifest, ProgramRecord, seal
from qeff_ir.reading import (
    MAX_JSON_DEPTH,
    files_below,
    list_folder,
    parse_json,
    plain_name,
    read_bytes,
    read_json,
    regular_file,
)

_BAD_NAMES = [
    "",
    ".",
    "..",
    "../x",
    "/abs",
    "a/b",
    "a\\b",
    "a\0b",
    "-o",
    ".hidden",
    "m[1]",
    "a*",
    "a b",
    "a\n",
    "x" * 129,
]


@pytest.mark.parametrize("name", [*_BAD_NAMES, None, 5, ["a"], "é" * 65])
def test_a_name_that_could_lead_elsewhere_is_refused(name: Any) -> None:
    with pytest.raises(ModelLoadError, match=r"the architecture is .* not a plain name"):
        plain_name(name, "the architecture")


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "layer_0.weight", "c++", "Ärger", "x" * 128])
def test_a_plain_name_is_itself(name: str) -> None:
    assert plain_name(name, "the architecture") == name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_text("outside")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"a": [1, {"b": 2}]}')
    return tmp_path / "model"


def test_a_file_and_a_link_inside_are_read(folder: Path) -> None:
    (folder / "link.json").symlink_to("config.json")
    assert read_json(folder / "config.json") == read_json(folder / "link.json") == {"a": [1, {"b": 2}]}
    assert regular_file(folder / "link.json") == (folder / "config.json").resolve()


def test_the_hubs_cache_links_into_its_blobs(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "abc").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    assert read_json(snapshot / "config.json") == {}
    (snapshot / "other.json").symlink_to("../../refs")
    (tmp_path / "models--a--b" / "refs").write_text("{}")
    with pytest.raises(ModelLoadError, match="outside"):
        read_json(snapshot / "other.json")


@pytest.mark.parametrize(
    "kind", ["link out", "link to a neighbor", "dangling", "loop", "fifo", "device", "folder", "missing", "NUL", "long"]
)
def test_what_is_not_a_file_of_the_folder_is_refused_without_waiting(folder: Path, kind: str) -> None:
    path = folder / "x.json"
    match kind:
        case "link out":
            path.symlink_to("../secret")
        case "link to a neighbor":  # whose name begins as the folder's
            neighbor = folder.with_name(f"{folder.name}-secret")
            neighbor.mkdir()
            (neighbor / "x.json").write_text("{}")
            path.symlink_to(neighbor / "x.json")
        case "dangling":
            path.symlink_to("nothing")
        case "loop":
            path.symlink_to("x.json")
        case "fifo":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "folder":
            path.mkdir()
        case "NUL":
            path = folder / "a\0b"
        case "long":
            path = folder / ("n" * 5000)
        case _:
            assert kind == "missing"
    with pytest.raises(PackageError) as caught:
        read_bytes(path, error=PackageError)
    assert "\n" not in str(caught.value)


def test_a_large_file_is_refused(folder: Path) -> None:
    with (folder / "big.txt").open("wb") as file:
        file.truncate(1 << 33)
    with pytest.raises(ModelLoadError, match=r"8,589,934,592 bytes, at most 268,435,456"):
        read_bytes(folder / "big.txt")


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_json_is_read_to_a_depth(opening: str) -> None:
    closing = "]" if opening == "[" else "}"

    def nested(depth: int) -> str:
        return opening * (depth - 1) + ("[]" if opening == "[" else "{}") + closing * (depth - 1)

    assert parse_json(nested(MAX_JSON_DEPTH), "it") == json.loads(nested(MAX_JSON_DEPTH))
    for depth in (MAX_JSON_DEPTH + 1, 100_000):
        with pytest.raises(ModelLoadError, match="it cannot be read as JSON"):
            parse_json(nested(depth), "it")


@pytest.mark.parametrize("text", ["", "{", b"\xff\xfe\xff", "\udcff", '{"a" 1}', "1" * 5000])
def test_what_is_not_json_is_one_sentence(text: str | bytes) -> None:
    with pytest.raises(PackageError, match="it cannot be read as JSON") as caught:
        parse_json(text, "it", PackageError)
    assert "\n" not in str(caught.value)


@pytest.fixture
def unlisted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the disk does not list; nothing stops root from listing one by its mode."""
    (folder / "sub").mkdir()
    (folder / "sub" / "b.txt").write_text("b")

    def failing(call: Callable[[Any], Any]) -> Callable[..., Any]:
        def list_(path: Any = ".") -> Any:
            if Path(path) == folder / "sub":
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
            return call(path)

        return list_

    monkeypatch.setattr(os, "scandir", failing(os.scandir))
    monkeypatch.setattr(os, "listdir", failing(os.listdir))
    return folder


def test_files_below_a_folder_are_listed_and_links_not_followed(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "b.txt").write_text("b")
    (folder / "other").symlink_to(folder / "sub")
    found = [path.relative_to(folder).as_posix() for path in files_below(folder)]
    assert "sub/b.txt" in found and "other" in found and "other/b.txt" not in found
    assert files_below(folder, "b.*") == [folder / "sub" / "b.txt"]


def test_a_folder_that_is_not_listed_is_not_an_empty_one(unlisted: Path) -> None:
    with pytest.raises(OSError, match="Input/output error"):
        files_below(unlisted)
    with pytest.raises(ModelLoadError, match=r"sub' cannot be listed \(Input/output error\): restore it"):
        files_below(unlisted, error=ModelLoadError)
    with pytest.raises(ModelLoadError, match=r"sub' cannot be listed \(Input/output error\): restore it"):
        list_folder(unlisted / "sub", error=ModelLoadError)


def test_a_package_with_a_folder_that_is_not_listed_is_not_sealed(unlisted: Path) -> None:
    with pytest.raises(OSError, match="Input/output error"):
        seal(unlisted, Manifest("onnxruntime", "key", True, {}, {MAIN: ProgramRecord("Model", {})}))
    assert not (unlisted / "package.json").exists()
