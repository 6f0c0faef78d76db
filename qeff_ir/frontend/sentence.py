"""What a sentence-transformers folder says of itself, all of it: each field is applied, or refused by its name.

Format: ``modules.json`` lists the modules in order, each with a folder of its own and, where it has options, a
``config.json`` (https://sbert.net/docs/package_reference/sentence_transformer/models.html). The tables below name every
file and field that the library acts on; ``tests/auto/test_sentence_folders.py`` holds each against the library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qeff_ir.errors import ModelLoadError, UnsupportedModelError
from qeff_ir.reading import read_json
from qeff_ir.runtime.text_settings import TextSettings

if TYPE_CHECKING:
    from qeff_ir.frontend.sentence_head import Dense

CONFIG = "config_sentence_transformers.json"

APPLIED: dict[str, frozenset[str]] = {
    "modules.json": frozenset({"path", "type"}),
    CONFIG: frozenset({"prompts", "default_prompt_name", "truncate_dim"}),
    "Transformer": frozenset({"max_seq_length", "do_lower_case", "processor_kwargs", "tokenizer_args"}),
    "Pooling": frozenset(
        {
            "pooling_mode", "pooling_mode_cls_token", "pooling_mode_max_tokens", "pooling_mode_mean_tokens",
            "pooling_mode_mean_sqrt_len_tokens", "pooling_mode_weightedmean_tokens", "pooling_mode_lasttoken",
        }
    ),
    "Dense": frozenset({"in_features", "out_features", "bias", "activation_function", "use_residual"}),
    "Normalize": frozenset(),
}  # fmt: skip
"""Fields that change what is computed, and that are applied: of a file, or of the configuration of a module."""

_TOKENS, _EMBEDDING = (None, "token_embeddings"), (None, "sentence_embedding")
_TEXT = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
_QUIET_MODEL_ARGUMENTS = frozenset({"attn_implementation", "device_map", "dtype", "torch_dtype", "trust_remote_code"})

REFUSED: dict[str, dict[str, Callable[[Any], bool]]] = {
    "modules.json": {"kwargs": lambda value: not value},
    CONFIG: {"model_type": lambda value: value in (None, "SentenceTransformer")},
    "Transformer": {
        "transformer_task": lambda value: value in (None, "feature-extraction"),
        "modality_config": lambda value: value is None or _plain(value) == _TEXT,
        "module_output_name": lambda value: value in _TOKENS,
        "processing_kwargs": lambda value: not value or not any(value.values()),
        "query_expansion": lambda value: value is None,
        "tokenizer_name_or_path": lambda value: value is None,
        "model_kwargs": lambda value: not set(value or ()) - _QUIET_MODEL_ARGUMENTS,
        "model_args": lambda value: not set(value or ()) - _QUIET_MODEL_ARGUMENTS,
        "config_kwargs": lambda value: not set(value or ()) - {"trust_remote_code"},
        "config_args": lambda value: not set(value or ()) - {"trust_remote_code"},
    },
    "Pooling": {"include_prompt": lambda value: value is not False},
    "Dense": {
        "module_input_name": lambda value: value in _EMBEDDING,
        "module_output_name": lambda value: value in _EMBEDDING,
        "init_weight": lambda value: value is None,
        "init_bias": lambda value: value is None,
    },
    "Normalize": {
        "module_input_name": lambda value: value in _EMBEDDING,
        "module_output_name": lambda value: value in _EMBEDDING,
    },
}
"""Fields of which only some values are what happens here; any other is refused."""

IRRELEVANT: dict[str, frozenset[str]] = {
    "modules.json": frozenset({"idx", "name"}),
    CONFIG: frozenset({"__version__", "requirements", "similarity_fn_name"}),
    # Lengths of ``encode_query`` and ``encode_document``, which are not offered; and how batches are laid out.
    "Transformer": frozenset({"query_length", "document_length", "unpad_inputs"}),
    "Pooling": frozenset({"embedding_dimension", "word_embedding_dimension"}),
    "Dense": frozenset(),
    "Normalize": frozenset(),
}
"""Fields that change no embedding."""

TRANSFORMER_FILES = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
"""Where the options of the transformer are: the first of these that has any."""

_OLD, _NEW, _BASE = (
    f"sentence_transformers.{home}" for home in ("models", "sentence_transformer.modules", "base.modules")
)
CLASSES = {
    **{f"{_OLD}.{kind}": kind for kind in ("Transformer", "Pooling", "Dense", "Normalize")},
    **{f"{_NEW}.{kind}": kind for kind in ("Transformer", "Pooling", "Dense", "Normalize")},
    **{f"{_BASE}.{kind}": kind for kind in ("Transformer", "Dense", "Normalize")},
    **{f"{_BASE}.{kind.lower()}.{kind}": kind for kind in ("Transformer", "Dense", "Normalize")},
    **{f"{_NEW}.{kind.lower()}.{kind}": kind for kind in ("Pooling", "Normalize")},
}
"""The modules that are read, by the dotted names that the library has for them."""

_MODES = {
    "cls": "cls",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_len_tokens": "mean-sqrt-len",
    "weightedmean": "weighted-mean",
    "lasttoken": "last",
}
"""sentence-transformers' names of poolings, in the order in which several are concatenated, and ours."""

_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""The older spelling: one switch for each, in the same order."""

_REST = "pass pooling= with a torch module of your own that does the rest"


@dataclass(frozen=True)
class SentenceConfig:
    """What a folder says of its model.

    Attributes:
        folder: Of the transformer itself.
        pooling: As the pass `embedding` spells it.
        steps: What follows the pooling, in order; `None` scales to unit length.
        dim: How many features are kept in the end.
        texts: What is done to texts.
    """

    folder: Path
    pooling: str
    steps: tuple[Dense | None, ...] = ()
    dim: int | None = None
    texts: TextSettings = field(default_factory=TextSettings)

    @property
    def normalize(self) -> bool:
        """Whether embeddings are scaled to unit length."""
        return None in self.steps


def read_sentence_config(folder: Path, pooling: object = None) -> SentenceConfig | None:
    """Read a folder's modules; `None` when it is no sentence-transformers folder.

    Args:
        folder: The folder.
        pooling: A mode that is used in place of the folder's pooling; or the user's own module, which takes the place
            of all that follows the transformer.

    Raises:
        ModelLoadError: A file is damaged, or names a folder outside.
        UnsupportedModelError: A module or a field asks for what is not done here.
    """
    path = folder / "modules.json"
    if not path.exists():
        return None
    modules = [(_type(m, path), _inside(folder, m.get("path") or "", path)) for m in _modules(path, folder)]
    own = pooling is not None and not isinstance(pooling, str)
    kinds = [_kind(name, path, own=own and index > 0) for index, (name, _) in enumerate(modules)]
    ordered = kinds[:1] == ["Transformer"] and (kinds[1:2] in ([], ["Pooling"])) and "Transformer" not in kinds[1:]
    if (not own and (not ordered or "Pooling" in kinds[2:])) or not kinds:
        raise UnsupportedModelError(
            f"{path} has the modules {', '.join(kinds) or 'of nothing'}: what is read is Transformer, then Pooling, "
            f"then Dense and Normalize; {_REST}"
        )
    if kinds[0] != "Transformer":
        raise UnsupportedModelError(f"{path} begins with {kinds[0]}, not with a Transformer: it is not read")
    inner = modules[0][1]
    steps: list[Dense | None] = []
    mode, pools_prompt = "none", True
    for kind, (_, place) in zip(kinds[1:], modules[1:], strict=True):
        if kind == "Pooling" and not isinstance(pooling, str) and not own:
            mode = _pooling(place / "config.json")
        elif kind == "Pooling" and not own and (place / "config.json").exists():
            pools_prompt = _object(place / "config.json").get("include_prompt") is not False
        elif kind == "Normalize":
            if (place / "config.json").exists():
                _check("Normalize", _object(place / "config.json"), place / "config.json")
            steps.append(None)
        elif kind == "Dense" and not own:
            steps.append(_dense(place))
    _refuse_adapter(inner)
    dim, texts = _texts(folder, inner)
    texts = replace(texts, pools_prompt=pools_prompt)
    return SentenceConfig(inner, pooling if isinstance(pooling, str) else mode, tuple(steps), dim, texts)


def _texts(folder: Path, inner: Path) -> tuple[int | None, TextSettings]:
    """``truncate_dim``, and what is done to texts."""
    path = folder / CONFIG
    data = _object(path) if path.exists() else {}
    kind = data.get("model_type")
    if kind == "CrossEncoder":
        raise UnsupportedModelError(
            f"{folder} is a CrossEncoder (model_type in {CONFIG}), which embeds nothing: open it with "
            "QEFFAutoModelForSequenceClassification"
        )
    _check(CONFIG, data, path)
    prompts = data.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(p, str | None) for p in prompts.values()):
        raise ModelLoadError(f"{path} has prompts that are not texts by name: restore it")
    # Both are known to every model.
    named = {"query": "", "document": ""} | {name: prompt or "" for name, prompt in prompts.items()}
    default = data.get("default_prompt_name")
    if default is not None and default not in named:
        raise ModelLoadError(f"{path} has the default_prompt_name {default!r}, but no prompt of that name: restore it")
    dim = _whole(data.get("truncate_dim"), "truncate_dim", path)
    candidates = (inner / name for name in TRANSFORMER_FILES)
    file, own = next(((p, found) for p in candidates if p.exists() and (found := _object(p))), (inner, {}))
    _check("Transformer", own, file)
    # The old name, where it is there, takes the place of the new one, as a whole.
    arguments = own.get("tokenizer_args" if "tokenizer_args" in own else "processor_kwargs") or {}
    unknown = sorted(set(arguments) - {"model_max_length", "trust_remote_code"})
    if unknown:
        raise UnsupportedModelError(
            f"{file} gives its tokenizer {', '.join(unknown)}, which is not supported: remove it"
        )
    longest = arguments.get("model_max_length", own.get("max_seq_length"))
    lower = own.get("do_lower_case") or False
    if not isinstance(lower, bool):
        raise ModelLoadError(f"{file} has do_lower_case={lower!r}, not true or false: restore it")
    longest = _whole(longest, "max_seq_length", file)
    return dim, TextSettings(named, default, lower, _longest(inner) if longest is None else longest)


def _longest(inner: Path) -> int | None:
    """Where nothing is said, what the tokenizer says; a huge number there stands for nothing."""
    path = inner / "tokenizer_config.json"
    said = _object(path).get("model_max_length") if path.exists() else None
    return said if type(said) is int and 0 < said < 1 << 30 else None


def _whole(value: Any, name: str, path: Path) -> int | None:
    if value is not None and (type(value) is not int or value < 1):
        raise ModelLoadError(f"{path} has {name}={value!r}, which is not a whole number of at least 1: restore it")
    return value


def _refuse_adapter(inner: Path) -> None:
    if (inner / "adapter_config.json").exists():
        raise UnsupportedModelError(
            f"{inner} holds an adapter (adapter_config.json), which sentence-transformers puts on its base model: "
            "merge it there (model[0].model.merge_and_unload(), then save), and give the merged folder"
        )


def _check(kind: str, data: Mapping[str, Any], path: Path) -> None:
    """Refuse a field with a value that is not what happens here."""
    for name, happens in REFUSED[kind].items():
        try:
            fine = name not in data or happens(data[name])
        except (TypeError, AttributeError, KeyError, IndexError):
            fine = False
        if not fine:
            raise UnsupportedModelError(
                f"{path} has {name}={str(data[name])[:80]}, which is not supported: remove it, or {_REST}"
            )


def _plain(modalities: Mapping[str, Any]) -> Any:
    """A configuration of modalities with each output by its name."""
    plain: dict[str, Any] = {}
    for kind, entry in modalities.items():
        output = entry["method_output_name"]
        plain[kind] = {**entry, "method_output_name": output[0] if isinstance(output, list) else output}
    return plain


def _kind(name: str, path: Path, *, own: bool) -> str:
    """The module that a class is; any name when the user's own module stands for it."""
    if name in CLASSES or own:
        return CLASSES.get(name, name)
    if not name.startswith("sentence_transformers."):
        raise UnsupportedModelError(
            f"{path} has a module of type {name}, a class of other code than sentence-transformers', which is not run: "
            f"{_REST}"
        )
    raise UnsupportedModelError(
        f"{path} has a module of type {name.rpartition('.')[2]}, which is not read: only "
        f"{', '.join(dict.fromkeys(CLASSES.values()))} are; {_REST}"
    )


def _type(module: Mapping[str, Any], path: Path) -> str:
    _check("modules.json", module, path)
    return module["type"]


def _modules(path: Path, folder: Path) -> list[dict[str, Any]]:
    data = read_json(path, folder)
    if not isinstance(data, list) or not all(isinstance(m, dict) and isinstance(m.get("type"), str) for m in data):  # pyright: ignore[reportUnknownVariableType]
        raise ModelLoadError(f"{path} is not a list of modules with a type each: download the model again")
    return data  # pyright: ignore[reportUnknownVariableType]


def _inside(folder: Path, name: str, path: Path) -> Path:
    if not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ModelLoadError(f"{path} names the folder {name!r}, which is no name: download the model again")
    try:
        inner = (folder / name).resolve()
        inner.exists()  # raises for a name that no file can have; a module without options may have no folder
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path} names a folder that cannot be ({error}): download the model again") from error
    if not inner.is_relative_to(folder.resolve()):
        raise ModelLoadError(f"{path} names '{name}', a folder outside the model: refused")
    return inner if name else folder


def _pooling(path: Path) -> str:
    data = _object(path)
    named: Any = data.get("pooling_mode")
    if named is None:
        named = [mode for flag, mode in _FLAGS.items() if data.get(flag)] or ["mean"]
    modes: list[Any] = named if isinstance(named, list) else [named]
    unknown = [m for m in modes if not isinstance(m, str) or m not in _MODES]
    if unknown or not modes:
        what = f"'{unknown[0]}'" if unknown else "of no name"
        raise ModelLoadError(f"{path} asks for the pooling {what}: there is {', '.join(_MODES)}")
    if data.get("include_prompt") is False:
        raise UnsupportedModelError(
            f"{path} leaves the prompt's tokens out (include_prompt), which is not supported: pass "
            f"pooling='{'+'.join(_MODES[m] for m in modes)}', which is the same for texts without a prompt"
        )
    return "+".join(_MODES[m] for m in modes)


def _dense(place: Path) -> Dense:
    from qeff_ir.frontend.sentence_head import Dense, activation

    path = place / "config.json"
    data = _object(path)
    _check("Dense", data, path)
    sizes = [data.get(name) for name in ("in_features", "out_features")]
    flags = [data.get("bias", True), data.get("use_residual", False)]
    if not all(type(size) is int and size > 0 for size in sizes) or not all(type(flag) is bool for flag in flags):
        raise ModelLoadError(f"{path} has the sizes {sizes} and the flags {flags} of a linear layer: restore it")
    name = activation(data.get("activation_function", "torch.nn.Tanh"), path)
    return Dense(place, (sizes[0], sizes[1]), flags[0], name, flags[1])  # pyright: ignore[reportArgumentType]


def _object(path: Path) -> dict[str, Any]:
    data = read_json(path)
    if not isinstance(data, dict):
        raise ModelLoadError(f"{path} is not a JSON object: download the model again")
    return data  # pyright: ignore[reportUnknownVariableType]
