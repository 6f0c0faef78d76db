"""The tasks whose architectures the coverage benchmark checks. To add one: an entry here, and a module that checks."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.coverage_row import Job, Row


class Coverage(ABC):
    """How the architectures of one task are checked."""

    @abstractmethod
    def architectures(self) -> list[str]:
        """Every model type that transformers maps to the task, by name."""

    @abstractmethod
    def absent(self) -> Mapping[str, str]:
        """Why architectures cannot be what is asked, one sentence for each."""

    @abstractmethod
    def check(self, job: Job, row: Row, folder: Path) -> None:
        """Build a small model, lower it, compile it for every backend, compare what both answer.

        Args:
            job: What to check.
            row: Is filled while the check goes on.
            folder: An empty folder for the packages.
        """


@dataclass(frozen=True)
class CoverageTask:
    """One task.

    Attributes:
        name: transformers' name of it.
        subject: Its models in words, plural.
        trace: One clause for the table: what they are asked.
        file: Name of its results beside this file, without ending.
        module: The module whose `COVERAGE` checks them; it imports torch.
    """

    name: str
    subject: str
    trace: str
    file: str
    module: str

    @property
    def results(self) -> Path:
        """What is known, as JSON; the table stands beside it."""
        return Path(__file__).parent / f"{self.file}.json"

    def coverage(self) -> Coverage:
        """How its models are checked."""
        return importlib.import_module(self.module).COVERAGE


TEXT_GENERATION = CoverageTask(
    "text-generation",
    "causal LMs",
    "two prompts of unequal lengths, prefill in chunks of 8, decode past the windows",
    "coverage",
    "benchmarks.coverage_causal",
)
IMAGE_TEXT_TO_TEXT = CoverageTask(
    "image-text-to-text",
    "models of pictures and text",
    "one prompt with two pictures between words, one of words alone; pictures through the encoder's program, prefill "
    "in chunks of 8 that cut a picture (unless its tokens see one another), decode; the pictures change the answer",
    "coverage_image_text",
    "benchmarks.coverage_pictures",
)
AUDIO_TEXT = CoverageTask(
    "audio-text",
    "models of sounds and text",
    "one prompt with two sounds between words, one of words alone; sounds through the encoder's program, prefill in "
    "chunks of 8 that cut a sound, decode; the sounds change the answer",
    "coverage_audio_text",
    "benchmarks.coverage_audio",
)
_ENCODED = (
    "two rows of unequal lengths go through the encoder, and are answered greedily; something else that is encoded "
    "changes the answer"
)
TEXT_TO_TEXT = CoverageTask(
    "text2text-generation",
    "encoder-decoders of texts",
    _ENCODED,
    "coverage_text2text",
    "benchmarks.coverage_text2text",
)
SPEECH = CoverageTask(
    "automatic-speech-recognition",
    "models of speech and text",
    _ENCODED,
    "coverage_speech",
    "benchmarks.coverage_speech",
)
TASKS = {task.name: task for task in (TEXT_GENERATION, IMAGE_TEXT_TO_TEXT, AUDIO_TEXT, TEXT_TO_TEXT, SPEECH)}
