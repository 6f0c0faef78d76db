"""No file and no field that the installed transformers acts on is without an entry, and the entries are true."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    modeling_utils,
    processing_utils,
    tokenization_utils_base,
    utils,
)
from transformers.generation.utils import GenerationMixin
from transformers.models.auto import auto_factory, configuration_auto
from transformers.quantizers import auto as quantizers
from transformers.utils import hub, peft_utils

from qeff_ir.auto.arguments import _ANYWAY, _HUB
from qeff_ir.frontend.checkpoint.config import DROPPED, REFUSED
from qeff_ir.frontend.checkpoint.folder_files import PATTERNS, read_side_files, write_side_files
from qeff_ir.frontend.checkpoint.model_files import FIELDS, FILES

MIXIN: Any = GenerationMixin  # its methods are typed for models that generate, not for itself
READERS: list[Callable[..., Any]] = [
    PreTrainedModel.from_pretrained,
    PreTrainedModel._from_config,
    PreTrainedModel.get_expanded_tied_weights_keys,
    modeling_utils._get_resolved_checkpoint_files,
    modeling_utils._get_dtype,
    PreTrainedConfig.get_config_dict,
    PreTrainedConfig._get_config_dict,
    PreTrainedConfig.from_dict,
    configuration_auto.AutoConfig.from_pretrained,
    auto_factory._BaseAutoModelClass.from_pretrained,
    auto_factory._get_model_class,
    quantizers.get_hf_quantizer,
    MIXIN.adjust_generation_fn,
    MIXIN.load_custom_generate,
]
"""What reads a model folder in transformers."""

_FIELDS = [
    r'getattr\((?:self\.)?(?:parent_)?config(?:\.get_text_config\([^)]*\))?, *\n? *"(\w+)"',
    r"\b(?:parent_)?config\.([a-z_]\w+)\b(?!\()",
    r'"(\w+)" (?:not )?in config_dict\b',
    r'config_dict\["(\w+)"\]',
    r"type\(config\)\.(\w+)",
]
_FILE = re.compile(r"[\w./]+\.(json|bin|safetensors|jinja|txt|model|py|gguf|msgpack|h5)")


def test_every_file_that_transformers_names_has_an_entry() -> None:
    modules = (utils, hub, peft_utils, tokenization_utils_base, processing_utils)
    constants = {v for m in modules for k, v in vars(m).items() if k.isupper() and isinstance(v, str)}
    named = {v for v in constants if _FILE.fullmatch(v)} | {hub.CHAT_TEMPLATE_DIR}
    code = re.sub(r'""".*?"""', "", "".join(map(inspect.getsource, READERS)), flags=re.DOTALL)
    named |= {n for n in re.findall(r'"([\w./]+)"', code) if _FILE.fullmatch(n) and not n.startswith(".")}
    assert len(named) > 10 and named <= set(FILES)


def test_every_field_that_transformers_looks_at_has_an_entry() -> None:
    code = "".join(map(inspect.getsource, READERS))
    found = {name for pattern in _FIELDS for name in re.findall(pattern, code)}
    found -= {"json", "__class__", "AutoConfig"}  # config.json is a file, and a class and a key are no fields
    assert len(found) > 10 and found <= set(FIELDS)


def test_every_argument_of_from_pretrained_is_known_or_refused() -> None:
    """What is not in the table is refused by name; what is, transformers still takes."""
    code = "".join(map(inspect.getsource, READERS))
    taken = set(re.findall(r'kwargs\.pop\(\s*"(\w+)"', code))
    taken |= set(inspect.signature(PreTrainedModel.from_pretrained).parameters)
    ignored = {"low_cpu_mem_usage"}  # popped in a loop
    fields = {"use_cache", "return_dict", "output_hidden_states", "output_attentions"}
    own = {"continuous_batching", "full_batch_size", "kv_offload", "layerwise", "max_seq_len_cached", "qaic_config"}
    assert set(_ANYWAY) | _HUB <= taken | ignored | fields | own


def test_the_entries_are_true() -> None:
    for name, treatment in FILES.items():
        if treatment == "copied":
            example = f"{name}/x.jinja" if name == hub.CHAT_TEMPLATE_DIR else name
            assert any(fnmatch(example, pattern) for pattern in PATTERNS), name
    assert {n for n, t in FIELDS.items() if t == "refused"} == {*REFUSED}
    assert {n for n, t in FIELDS.items() if t == "without effect"} >= set(DROPPED & FIELDS.keys())


def test_the_files_of_every_tokenizer_are_copied() -> None:
    root = Path(transformers.__file__).parent
    found: set[str] = set()
    for path in [*root.glob("models/*/tokenization_*.py"), *root.glob("tokenization*.py")]:
        for table in re.findall(r"VOCAB_FILES_NAMES\s*=\s*\{(.*?)\}", path.read_text(), re.DOTALL):
            found |= set(re.findall(r':\s*"([^"]+)"', table))
    assert len(found) > 10
    assert not [name for name in found if not any(fnmatch(name, pattern) for pattern in PATTERNS)]


def test_templates_of_a_folder_of_their_own_are_copied(tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    (model / hub.CHAT_TEMPLATE_DIR).mkdir(parents=True)
    (model / hub.CHAT_TEMPLATE_DIR / "tools.jinja").write_text("{{ x }}")
    (model / "a.json").write_text("{}")
    out.mkdir()
    write_side_files(read_side_files(model), out)
    assert (out / hub.CHAT_TEMPLATE_DIR / "tools.jinja").read_text() == "{{ x }}"
    assert (out / "a.json").read_text() == "{}"


@pytest.mark.parametrize(
    "name", ["model.safetensors", "evil.py", "x.bin", "inner/x.json", "model.safetensors.index.json"]
)
def test_weights_and_code_are_not(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")
    assert not read_side_files(tmp_path)
