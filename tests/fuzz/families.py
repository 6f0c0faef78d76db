"""The families of input: how each is damaged, who reads it, and what must hold when it is accepted."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import safetensors
from hypothesis import strategies as st

from qeff_ir.errors import QeffError
from tests.fuzz.base import answer, base, copied, read
from tests.fuzz.damage import JUNK, Draw, damage_message, damaged_bytes, damaged_json

Family = Callable[[Draw, Path], None]
"""Draws an input into a folder and reads it; a `QeffError` is a refusal, returning is acceptance."""

FAMILIES: dict[str, Family] = {}


class WrongError(Exception):
    """An input was accepted, and what followed is wrong."""


def family(function: Family) -> Family:
    """Add a family, by its name."""
    FAMILIES[function.__name__.removeprefix("_")] = function
    return function


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise WrongError(what)


_KEYS = ("dtype", "shape", "data_offsets", "__metadata__", "F32", "BF16", "U8", "F8_E4M3", "model.embed_tokens.weight")


@family
def _safetensors(draw: Draw, folder: Path) -> None:
    """The header and size of a weight file: accepted tensors are those that the library reads."""
    from qeff_ir.frontend.checkpoint.references import open_checkpoint

    data = (base().model / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    match draw(st.integers(0, 3)):
        case 0:
            made = damaged_bytes(draw, data[: 8 + size]) + data[8 + size :]
        case 1:
            made = data[: draw(st.integers(0, len(data)))]
        case 2:  # whole, but with other names, types and sizes of as many bytes
            header = json.loads(data[8 : 8 + size])
            names = [name for name in header if name != "__metadata__"]
            for one, other in draw(st.lists(st.tuples(st.sampled_from(names), st.sampled_from(names)), max_size=4)):
                header[one], header[other] = header[other], header[one]
                header[other]["shape"] = draw(st.permutations(header[other]["shape"]))
                header[one]["dtype"] = draw(st.sampled_from(("F32", "I32", "U32", "F8_E8M0", "C64")))
            text = json.dumps(header).encode() + b" " * draw(st.integers(0, 9))
            made = len(text).to_bytes(8, "little") + text + data[8 + size :]
        case _:
            header = damaged_json(draw, json.loads(data[8 : 8 + size]), _KEYS)
            made = len(header).to_bytes(8, "little") + header + data[8 + size :]
    (folder / "model.safetensors").write_bytes(made)
    entries = open_checkpoint(folder).entries
    known = dict(safetensors.deserialize(made))
    _require(entries.keys() == known.keys(), "other tensors than the library's")
    for name, entry in entries.items():
        content = made[entry.offset : entry.offset + entry.length]
        same = content == bytes(known[name]["data"]) and list(entry.shape) == known[name]["shape"]
        _require(same, f"other bytes or sizes of '{name}' than the library's")


@family
def _index(draw: Draw, folder: Path) -> None:
    """The index of a checkpoint in shards, and which of its files are there."""
    from qeff_ir.frontend.checkpoint.references import open_checkpoint

    shards = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    for name in shards:
        shutil.copy(base().model / "model.safetensors", folder / name)
    with safetensors.safe_open(folder / shards[0], "numpy") as file:
        names = list(file.keys())
    index = {"metadata": {"total_size": 1}, "weight_map": {n: shards[i % 2] for i, n in enumerate(names)}}
    words = (*shards, "../model.safetensors", "config.json", "weight_map", "metadata")
    (folder / "model.safetensors.index.json").write_bytes(damaged_json(draw, index, words))
    if draw(st.integers(0, 9)) == 0:
        (folder / shards[1]).unlink()
        if draw(st.booleans()):
            (folder / shards[1]).symlink_to(draw(st.sampled_from(("/dev/zero", "nothing", shards[0], ".", shards[1]))))
    for entry in open_checkpoint(folder).entries.values():
        _require(entry.file.resolve().is_relative_to(folder.resolve()), f"{entry.file} is read")


_CONFIG = (
    "hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "gelu",
    "hidden_act", "rope_parameters", "rope_scaling", "rope_type", "rope_theta", "dynamic", "longrope", "model_type",
    "architectures", "auto_map", "AutoConfig", "evil.Config", "tie_word_embeddings", "pad_token_id", "eos_token_id",
    "torch_dtype", "dtype", "quantization_config", "_attn_implementation", "attacker/kernel", "layer_types",
    "sliding_window", "text_config", "gpt2", "clip", "t5", "mamba", "bert", "sliding_attention", "is_decoder",
)  # fmt: skip


@family
def _config(draw: Draw, folder: Path) -> None:
    """The configuration of a model: it opens, and its weights are found, or one sentence."""
    from qeff_ir.frontend.source import open_source

    (folder / "config.json").write_bytes(damaged_json(draw, read(base().model / "config.json"), _CONFIG))
    shutil.copy(base().model / "model.safetensors", folder)
    source = open_source(folder)
    source.identity()
    source.weights()


_TOKENIZER = (
    "tokenizer_class", "PreTrainedTokenizerFast", "LlamaTokenizer", "auto_map", "chat_template", "eos_token", "model",
    "type", "BPE", "Unigram", "vocab", "merges", "added_tokens", "normalizer", "pre_tokenizer", "max_new_tokens",
    "max_length", "eos_token_id", "pad_token_id", "do_sample", "temperature", "num_beams", "stop_strings", "top_k",
    "cache_implementation", "output_hidden_states", "use_cache", "transformers_version", "guidance_scale",
)  # fmt: skip


@family
def _tokenizer(draw: Draw, folder: Path) -> None:
    """Tokenizer and generation defaults of a model folder, read as ``qeff run`` does from its package."""
    from qeff_ir.auto.causal_lm import QEFFAutoModelForCausalLM
    from qeff_ir.cli.models import open_tokenizer

    package = copied(base().packages["onnxruntime"], folder / "package")
    side = package / "huggingface"
    name = draw(st.sampled_from(("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json")))
    (side / name).write_bytes(damaged_json(draw, read(side / name), _TOKENIZER))
    _reseal(package)
    tokenizer = open_tokenizer(side)
    model = QEFFAutoModelForCausalLM.from_package(package)
    model.generate(prompts=["1+2="], tokenizer=tokenizer, max_new_tokens=2)


@family
def _package(draw: Draw, folder: Path) -> None:
    """A package that was changed after it was sealed: refused, or it answers as before."""
    target = draw(st.sampled_from(sorted(base().packages)))
    package = copied(base().packages[target], folder / "package")
    files = sorted(p for p in package.rglob("*") if p.is_file())
    path = draw(st.sampled_from(files))
    match draw(st.integers(0, 6)):
        case 0:
            path.unlink()
        case 1:
            path.unlink()
            path.symlink_to(draw(st.sampled_from(("/etc/hostname", "/dev/zero", "nothing", ".", path.name))))
        case 2:
            path.unlink()
            os.mkfifo(path)
        case 3:
            (package / draw(st.sampled_from(("extra.onnx", "huggingface/extra.json", "qpc", "x.json")))).write_bytes(
                b"{"
            )
        case 4 if path.suffix == ".json":
            path.write_bytes(damaged_json(draw, read(path), ("files", "target", "ai100", "onnxruntime", "../x")))
        case _:
            stat = path.stat()
            path.write_bytes(damaged_bytes(draw, path.read_bytes()))
            if draw(st.booleans()):
                os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    _require(answer(package) == base().answers[target], f"the package answers otherwise ({path.name} was changed)")


_ONNX = (
    "input_ids", "position_ids", "logits", "batch_size", "seq_len", "ctx_len", "MatMul", "Gather", "Identity", "Loop",
    "qeff", "com.qti.aisw.onnx", "qeff.module", "qeff.weight", "location", "offset", "length", "../../etc/passwd",
)  # fmt: skip


@family
def _resealed(draw: Draw, folder: Path) -> None:
    """A package whose damage its manifest vouches for: it opens and answers anything, or one sentence."""
    target = "ai100" if draw(st.integers(0, 3)) == 3 else "onnxruntime"  # the emulator takes four times as long to open
    package = copied(base().packages[target], folder / "package")
    path = draw(st.sampled_from(sorted(p for p in package.rglob("*") if p.is_file() and p.suffix != ".safetensors")))
    if path.suffix == ".onnx" and draw(st.integers(0, 3)):
        model = onnx.load(str(path), load_external_data=False)
        damage_message(draw, model, _ONNX)
        path.write_bytes(model.SerializeToString())
    elif path.suffix == ".json":
        path.write_bytes(
            damaged_json(draw, read(path), ("symbols", "specializations", "batch_size", "seq_len", "ctx_len"))
        )
    else:
        path.write_bytes(damaged_bytes(draw, path.read_bytes()))
    _reseal(package)
    answer(package)


def _reseal(package: Path) -> None:
    from qeff_ir.package import MANIFEST, Manifest, read_manifest, seal

    try:
        manifest: Manifest = read_manifest(package)
    except QeffError:  # it is the manifest that was damaged
        return
    (package / MANIFEST).unlink()
    seal(package, manifest)


@family
def _onnx(draw: Draw, folder: Path) -> None:
    """An ONNX file of somebody else, through ``qeff opt``: what is written opens in onnx."""
    from qeff_ir.debug.plain import load_onnx
    from qeff_ir.ir.printer import fingerprint
    from qeff_ir.ir.snapshot import save_module
    from qeff_ir.passing.manager import run_pipeline
    from qeff_ir.passing.pipeline import Pipeline

    source = draw(st.sampled_from(base().onnx))
    path = copied(source.parent, folder / "in") / "model.onnx"
    if draw(st.integers(0, 4)):
        model = onnx.load(str(path), load_external_data=False)
        damage_message(draw, model, _ONNX)
        path.write_bytes(model.SerializeToString())
    else:
        path.write_bytes(damaged_bytes(draw, path.read_bytes()))
    module = load_onnx(path)
    run_pipeline(module, Pipeline.parse("canonicalize"), check=draw(st.sampled_from((1, 2))))
    fingerprint(module)
    onnx.load(str(save_module(module, folder / "out")))


@family
def _facts(draw: Draw, folder: Path) -> None:
    """What a saved module says of itself, in the metadata of its ONNX file."""
    from qeff_ir.cost import cost
    from qeff_ir.ir.printer import to_text
    from qeff_ir.ir.snapshot import load_module

    source = base().packages[draw(st.sampled_from(sorted(base().packages)))]
    path = next(source.glob("*.onnx"))
    model = onnx.load(str(path), load_external_data=False)
    entry = draw(st.sampled_from(list(model.metadata_props)))
    try:
        entry.value = damaged_json(draw, json.loads(entry.value), _ONNX).decode()
    except ValueError:
        entry.value = draw(st.sampled_from([t for t in JUNK if isinstance(t, str) and t.isprintable()]))
    made = folder / "model.onnx"
    made.write_bytes(model.SerializeToString())
    copied(source / "weights", folder / "weights")
    module = load_module(made)
    to_text(module)
    for specialization in module.specializations:
        cost(module, specialization)


@family
def _bundles(draw: Draw, folder: Path) -> None:
    """A failure bundle: its files are data, inside of it."""
    from qeff_ir.debug.bundle import read_bundle, read_trace

    bundle = copied(draw(st.sampled_from(base().bundles)), folder / "bundle")
    path = draw(st.sampled_from(sorted(p for p in bundle.rglob("*") if p.is_file())))
    match draw(st.integers(0, 5)):
        case 0:
            path.unlink()
            if draw(st.booleans()):
                os.mkfifo(path)
            else:
                path.symlink_to(draw(st.sampled_from(("/dev/zero", "/etc/hostname", "nothing", "."))))
        case 1 | 2 if path.suffix == ".onnx":
            model = onnx.load(str(path), load_external_data=False)
            damage_message(draw, model, _ONNX)
            path.write_bytes(model.SerializeToString())
        case 3 | 4:
            words = ("pass_id", "pipeline", "merge-lora{adapter=/etc}", "suffix", "check", "versions")
            (bundle / "metadata.json").write_bytes(damaged_json(draw, read(bundle / "metadata.json"), words))
        case _:
            path.write_bytes(damaged_bytes(draw, path.read_bytes()))
    read_bundle(bundle)
    read_trace(bundle)


_ADAPTER = (
    "r", "lora_alpha", "target_modules", "exclude_modules", "all-linear", "layers_to_transform", "layers_pattern",
    "rank_pattern", "alpha_pattern", "bias", "lora_only", "lora_bias", "use_dora", "use_rslora", "fan_in_fan_out",
    "init_lora_weights", "pissa", "olora", "PISSA_niter_4", "eva", "modules_to_save", "peft_type", "LORA", "IA3",
    "task_type", "target_parameters", "lm_head", "q_proj", "base_model_name_or_path", "(a+)+$", "auto_mapping",
)  # fmt: skip


@family
def _adapters(draw: Draw, folder: Path) -> None:
    """An adapter as PEFT saves it."""
    from qeff_ir.adapters.folder import open_adapter

    adapter = copied(draw(st.sampled_from(base().adapters)), folder / "adapter")
    path = adapter / "adapter_model.safetensors"
    match draw(st.integers(0, 4)):
        case 0:
            path.write_bytes(damaged_bytes(draw, path.read_bytes()))
        case 1:
            data = path.read_bytes()
            size = int.from_bytes(data[:8], "little")
            header = damaged_json(draw, json.loads(data[8 : 8 + size]), _KEYS)
            path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])
        case _:
            config = adapter / "adapter_config.json"
            config.write_bytes(damaged_json(draw, read(config), _ADAPTER))
    read_back = open_adapter(adapter)
    _require(read_back.rank > 0, "an adapter without a rank")


_PIPELINES = (
    "canonicalize", "unflatten", "fuse-norms", "fuse-rotary", "fuse-activations", "last-logits", "kv-retention",
    "attention", "ort-attention", "ort-rotary", "ort-kernels", "fp16-clip", "legalize", "lora", "merge-lora",
    "embedding", "token-embedding", "{", "}", "=", ",", ";", " ", "layout=", "tensor-scatter", "impl=", "grouped",
    "keep=", "slots=", "1", "-1", "0.5", "true", "[1,2]", '"', "'", "\\", "\0", "é", "nothing", "99999999999999999999",
)  # fmt: skip

_SETTINGS = (
    "layout=tensor-scatter", "impl=grouped", "keep=1", "opset=18", "opset=-1", "opset=17", "n=2", "n=0", "rank=4",
    "rank=1e3", 'targets="q_proj v_proj"', "targets=q_proj", 'layers="0,1"', "retained=true", "retained=false",
    "pooling=mean", "pooling=x", "normalize=true", "normalize=1", "weights=true", 'adapter="x y"', "adapter={}",
    "limit=0.5", "x=1",
)  # fmt: skip


@family
def _pipelines(draw: Draw, folder: Path) -> None:
    """The text of a pipeline: what is read prints as a text that reads the same."""
    from qeff_ir.passing.base import registered_passes
    from qeff_ir.passing.pipeline import Pipeline

    names = sorted(registered_passes())
    if draw(st.booleans()):  # whole passes, options that are theirs or another's
        options = st.one_of(st.just([]), st.lists(st.sampled_from(_SETTINGS), max_size=2))
        steps = draw(st.lists(st.tuples(st.sampled_from(names), options), max_size=4))
        text = ",".join(f"{name}{{{' '.join(options)}}}" if options else name for name, options in steps)
    else:
        text = "".join(draw(st.lists(st.sampled_from(_PIPELINES), max_size=12)))
    steps = Pipeline.parse(text)
    _require(Pipeline.parse(str(steps)) == steps, f"'{text}' reads back as another pipeline")


_COMMANDS = (
    "run", "cost", "opt", "diff", "passes", "replay", "verify", "compile", "embed", "bisect", "reduce", "view",
)  # fmt: skip
_OPTIONS = (
    "--prompt", "1+2=", "--max-new-tokens", "--ctx-len", "--prefill-seq-len", "--batch-size", "--target", "ai100",
    "onnxruntime", "--emit-only", "--stream", "--temperature", "--top-k", "--top-p", "--seed", "--device", "ultra",
    "-p", "canonicalize", "--check", "--report", "r.html", "-o", "out", "--explain", "kv-retention", "--only", "--dump",
    "--help", "--version", "--debug", "--mxfp6-matmul", "--num-devices", "--pipeline", "--unknown", "--token-embedding",
    "host", "0", "1", "2", "-1", "16", "4294967296", "1e309", "nan", "", " ", "é", "../x", "/dev/null", "/", "x[1]",
)  # fmt: skip
_SLOW = frozenset({"verify", "compile", "view", "reduce", "bisect"})
"""Commands that lower a model, wait or work long: only ever given what does not exist."""


@family
def _commands(draw: Draw, folder: Path) -> None:
    """The command line: an exit code of 0, 1 or 2, and no traceback."""
    from qeff_ir.cli import main

    command = draw(st.sampled_from(_COMMANDS))
    (folder / "empty").mkdir()
    (folder / "text.onnx").write_text("text")
    places = ["empty", "text.onnx", "nothing", "/dev/null", "a\ud800", "x" * 300]
    if command not in _SLOW:
        places += [str(p) for p in (*base().packages.values(), *base().onnx, *base().bundles)]
    more = draw(st.lists(st.sampled_from([*_OPTIONS, *places]), max_size=5))
    words = [command, draw(st.sampled_from(places)), *more]
    if draw(st.integers(0, 3)) == 0:  # a sound command, and at times a few words that may fit
        package, module = str(base().packages["onnxruntime"]), str(base().onnx[0])
        sound = (
            ["run", package, "--prompt", "1+2=", "--max-new-tokens", "2"],
            ["cost", package],
            ["opt", module, "-p", "canonicalize", "-o", "out"],
            ["diff", module, str(base().onnx[1])],
            ["passes"],
            ["passes", "canonicalize"],
        )
        words = [*draw(st.sampled_from(sound)), *more[:2]]
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output), contextlib.chdir(folder):
        code = main(words)
    _require(code in (0, 1, 2), f"qeff {words} ends with {code}: {output.getvalue()[-300:]}")
    _require("Traceback" not in output.getvalue() or "--debug" in words, f"qeff {words} shows a traceback")
    if code == 2:
        raise QeffError("refused")


@family
def _calls(draw: Draw, folder: Path) -> None:
    """Calls from Python with arguments of any type."""
    import torch
    from transformers import GenerationConfig

    from qeff_ir import QEFFAutoModel, QEFFAutoModelForCausalLM
    from qeff_ir.adapters.folder import open_adapter

    odd = (*JUNK, b"x", object(), {"a": 1}, {1, 2}, torch.ones(1, 2), torch.full((1, 2), float("nan")), Path("nothing"))
    junk = st.sampled_from(odd)
    openers = (
        QEFFAutoModelForCausalLM, QEFFAutoModel, QEFFAutoModelForCausalLM.from_pretrained, open_adapter,
        QEFFAutoModel.from_pretrained, QEFFAutoModelForCausalLM.from_package, QEFFAutoModel.from_package,
    )  # fmt: skip
    if draw(st.integers(0, 3)) == 0:
        with contextlib.chdir(folder):
            draw(st.sampled_from(openers))(draw(junk))
        return
    model = QEFFAutoModelForCausalLM.from_package(base().packages["onnxruntime"])
    ids = (torch.tensor([[5, 6, 7]]), torch.tensor([[5, 6], [7, 8]]), torch.tensor([[]]), torch.tensor([[5, 10**6]]))
    given: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False}
    own = {"attention_mask", "prompts", "tokenizer", "streamer", "adapters"}
    fields = sorted(own | set(GenerationConfig().to_dict()))
    for _ in range(draw(st.integers(1, 2))):
        given[draw(st.sampled_from(fields))] = draw(junk)
    if not isinstance(given["max_new_tokens"], int) or given["max_new_tokens"] < 100:
        given.setdefault("max_time", 5.0)
    model.generate(draw(st.one_of(st.sampled_from(ids), junk)), **given)
