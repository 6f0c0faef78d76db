"""How a sentence model wants its texts: prompts, lower case, and how many tokens it reads; kept in the package."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qeff_ir.errors import PackageError, RuntimeInputError
from qeff_ir.reading import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE = "text_settings.json"
"""The settings, beside the tokenizer of a package; absent when all are as they are by default."""


@dataclass(frozen=True, slots=True)
class TextSettings:
    """What is done to a text before it becomes tokens.

    Attributes:
        prompts: What a text starts with, by the name of a prompt.
        default_prompt_name: The prompt of texts for which none is given.
        lower_case: Whether texts become lower case, whatever the tokenizer does.
        max_length: Tokens of a text that the model reads; `None` where its positions alone tell.
        pools_prompt: Whether a prompt's tokens are pooled with those of the text. Where they would have to be left out,
            a prompt is refused.
    """

    prompts: Mapping[str, str] = field(default_factory=dict[str, str])
    default_prompt_name: str | None = None
    lower_case: bool = False
    max_length: int | None = None
    pools_prompt: bool = True

    def prompt(self, prompt: str | None, name: str | None) -> str:
        """What texts start with.

        Args:
            prompt: The prompt itself, or
            name: the name of one; by default the model's own, if it has one.

        Raises:
            RuntimeInputError: Both are given, there is no prompt of that name, or the model takes none here.
        """
        if prompt is not None and name is not None:
            raise RuntimeInputError("both a prompt and a prompt_name are given: give one of them")
        found = self._named(name) if prompt is None else prompt
        if found and not self.pools_prompt:
            raise RuntimeInputError(
                "the model leaves a prompt's tokens out of its pooling (include_prompt), which is not supported: give "
                "prompt=''"
            )
        return found

    def _named(self, name: str | None) -> str:
        name = self.default_prompt_name if name is None else name
        if name is None:
            return ""
        if name not in self.prompts:
            known = ", ".join(map(repr, self.prompts)) or "none"
            raise RuntimeInputError(f"the model has no prompt named {name!r}: it has {known}")
        return self.prompts[name]

    def apply(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Make a tokenizer see texts in lower case, if that is wanted.

        Raises:
            RuntimeInputError: It has no normalizer that could do it.
        """
        if not self.lower_case:
            return
        from tokenizers import normalizers

        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise RuntimeInputError(
                f"{type(tokenizer).__name__} cannot be told to read texts in lower case, as the model wants it "
                "(do_lower_case): give texts in lower case and tokenizer="
            )
        own = [] if backend.normalizer is None else [backend.normalizer]
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *own])

    def write(self, folder: Path) -> None:
        """Keep the settings in a folder, in place of any that are there."""
        (folder / FILE).unlink(missing_ok=True)
        if self != TextSettings():
            (folder / FILE).write_text(json.dumps(asdict(self), indent=2, sort_keys=True))

    @classmethod
    def read(cls, folder: Path) -> TextSettings:
        """The settings of a folder.

        Raises:
            PackageError: They are damaged.
        """
        path = folder / FILE
        if not path.exists():
            return cls()
        data = read_json(path, folder, error=PackageError)
        try:
            found: Any = cls(**data)
        except TypeError as error:
            raise PackageError(f"{path} has other settings than are known: compile again") from error
        texts = found.prompts.items() if isinstance(found.prompts, dict) else [(None, None)]
        if (
            not all(isinstance(text, str) for pair in texts for text in pair)
            or not isinstance(found.default_prompt_name, str | None)
            or {type(found.lower_case), type(found.pools_prompt)} != {bool}
            or type(found.max_length) not in (int, type(None))
        ):
            raise PackageError(f"{path} has a setting of the wrong type: compile again")
        return found
