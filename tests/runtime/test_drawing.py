"""transformers' loop over a session that draws: what a request asks for is done by the session, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qeff_ir import QEFFAutoModelForCausalLM, QEffAutoPeftModelForCausalLM
from qeff_ir.errors import PackageError, RuntimeInputError
from qeff_ir.runtime.decoder import Decoder
from qeff_ir.runtime.engine import Engine
from qeff_ir.runtime.jobs import Job, Sampling
from tests import support
from tests.adapters.random_adapters import make
from tests.models import VOCAB

IDS = torch.tensor([support.PROMPTS[1]])


@pytest.fixture(scope="module")
def drawing(tmp_path_factory: pytest.TempPathFactory) -> QEFFAutoModelForCausalLM:
    model = QEFFAutoModelForCausalLM(support.tiny("llama")[1])
    folder = tmp_path_factory.mktemp("drawing") / "package"
    shapes: dict[str, Any] = {"prefill_seq_len": 4, "ctx_len": 24}
    model.compile(target="onnxruntime", pipeline="+sampling{top=20}", compile_dir=folder, **shapes)
    return model


@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.9}, {"do_sample": True, "top_k": 1}])
def test_where_there_is_no_choice_the_tokens_are_those_of_transformers(
    drawing: QEFFAutoModelForCausalLM, settings: dict[str, Any]
) -> None:
    settings = {"do_sample": False, "max_new_tokens": 8, **settings}
    expected = support.generate(support.tiny("llama")[1], inputs=IDS, **settings)
    assert torch.equal(drawing.generate(IDS, **settings), expected)


def test_a_seed_of_torch_repeats_a_draw(drawing: QEFFAutoModelForCausalLM) -> None:
    settings: dict[str, Any] = {"do_sample": True, "temperature": 3.0, "top_k": 20, "max_new_tokens": 12}
    found: list[list[int]] = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        found.append(drawing.generate(IDS, **settings)[0].tolist())
    assert found[0] == found[1] != found[2]
    assert len(found[0]) == IDS.shape[1] + 12 and max(found[0]) < VOCAB


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"min_new_tokens": 2}, "min_new_tokens needs scores"),
    ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size needs scores"),
    ({"bad_words_ids": [[5]]}, "bad_words_ids needs scores"),
    ({"output_scores": True, "return_dict_in_generate": True}, "output_scores needs scores"),
    ({"logits_processor": [lambda ids, scores: scores]}, "logits_processor needs scores"),
    ({"prefix_allowed_tokens_fn": lambda row, ids: [5]}, "prefix_allowed_tokens_fn needs scores"),
    ({"do_sample": True, "top_k": 21}, "top_k=21 draws from more than the 20 tokens"),
    ({"do_sample": True, "top_k": 0}, "top_k=0 draws from more than the 20 tokens"),
    ({"do_sample": True, "top_k": 9, "typical_p": 0.4}, "typical_p needs scores"),
]


@pytest.mark.parametrize(("settings", "why"), REFUSED, ids=[next(iter(s)) + str(i) for i, (s, _) in enumerate(REFUSED)])
def test_what_needs_scores_is_refused_by_name(
    drawing: QEFFAutoModelForCausalLM, settings: dict[str, Any], why: str
) -> None:
    with pytest.raises(RuntimeInputError, match=why):
        drawing.generate(IDS, max_new_tokens=3, **settings)


def test_scores_are_not_there_to_be_read(drawing: QEFFAutoModelForCausalLM) -> None:
    with pytest.raises(RuntimeInputError, match="returns tokens that it draws, and no logits"):
        drawing.score(tokens=[4, 5], input_ids=IDS)
    with pytest.raises(PackageError, match="returns tokens that it draws, and no logits"):
        Decoder(drawing.runner().decoder.session)


def test_prompts_that_are_read_one_by_one_take_no_presence_penalty(tmp_path: Path) -> None:
    from qeff_ir.ir.draw import Draw
    from qeff_ir.runtime.drawing_decoder import DrawingDecoder

    model = QEFFAutoModelForCausalLM(support.tiny("llama")[1])
    model.compile(target="onnxruntime", pipeline="+sampling", prefill_seq_len=1, ctx_len=8, compile_dir=tmp_path / "p")
    decoder = model.runner().decoder
    assert isinstance(decoder, DrawingDecoder)
    decoder.prefill([[5, 6]])
    decoder.draw = Draw(presence=np.ones(1, np.float32))
    with pytest.raises(RuntimeInputError, match="compile with prefill_seq_len=2 or more"):
        decoder.decode([7])


def answers(session: Any, jobs: list[Job]) -> list[list[int]]:
    with Engine(session) as engine:
        tickets = [engine.submit(job) for job in jobs]
        return [[emitted.token for emitted in ticket] for ticket in tickets]


def test_an_engine_gives_each_job_its_settings(tmp_path: Path) -> None:
    """The tokens are those that the host chooses of logits, also where a last chunk has one token, or is known."""
    plain = support.open_decoder(support.canonical("llama"), tmp_path / "plain").session
    own = support.open_drawing(support.canonical("llama"), tmp_path / "own", "sampling{guided=true}").session
    long, short = support.PROMPTS
    settings = [
        Sampling(repetition_penalty=1.7),
        Sampling(presence_penalty=-40.0),  # the first token of the answer is repeated, and none of the prompt
        Sampling(),
        Sampling(temperature=0.9, top_k=1, presence_penalty=1.5),
    ]
    prompts = [long[:17], short, long, [*long[:16], 9], long[:1]]
    jobs = [Job(p, 7, sampling=settings[i % 4]) for i, p in enumerate([*prompts, *prompts, *prompts[:2]])]
    expected = answers(plain, jobs)
    assert answers(own, jobs) == expected
    assert len({tuple(tokens) for tokens in expected}) > 6
    drawn = [Job(short, 6, sampling=Sampling(temperature=2.0, seed=seed)) for seed in (4, 4, 5)]
    found = answers(own, drawn)
    assert found[0] == found[1] != found[2]


class Two:
    """Allows two tokens."""

    def mask(self) -> Any:
        return np.isin(np.arange(VOCAB), [7, 50])

    def advance(self, token: int) -> None:
        assert token in (7, 50)


def test_an_engine_refuses_what_a_graph_that_draws_does_not_do(tmp_path: Path) -> None:
    session = support.open_drawing(support.canonical("llama"), tmp_path / "own", "sampling{top=20}").session
    for job, why in (
        (Job([5], 2, sampling=Sampling(frequency_penalty=1.0)), "frequency_penalty needs logits"),
        (Job([5], 2, sampling=Sampling(bias={4: 1.0})), "bias needs logits"),
        (Job([5], 2, sampling=Sampling(logprobs=1)), "logprobs needs logits"),
        (Job([5], 2, sampling=Sampling(temperature=1.0, top_k=21)), "top_k is 21, more than the 20 tokens"),
        (Job([5], 2, constraint=Two()), "takes no mask of tokens"),
    ):
        with Engine(session) as engine, pytest.raises(RuntimeInputError, match=why):
            engine.submit(job)
    guided = support.open_drawing(support.canonical("llama"), tmp_path / "guided", "sampling{guided=true}").session
    (found,) = answers(guided, [Job([5, 6], 8, sampling=Sampling(temperature=9.0, seed=1), constraint=Two())])
    assert set(found) == {7, 50}


@pytest.mark.parametrize("target", ["onnxruntime", "ai100"])
def test_slots_adapters_and_weights_of_few_bits_go_together(target: str, tmp_path: Path) -> None:
    """Greedy tokens of a package with all of it are those of the same package with logits; rows have adapters."""
    make(support.tiny("llama")[1], tmp_path / "one", 0, r=4, target_modules=["q_proj", "down_proj"])
    ids = torch.tensor(support.prompts([11, 11]))
    found: list[torch.Tensor] = []
    weights = "+quantize-weights{bits=8 block=32}"
    for number, text in enumerate((weights, f"{weights},+sampling")):
        model = QEffAutoPeftModelForCausalLM._opened(support.Lowered("llama"))
        model.load_adapter(tmp_path / "one", "one")
        shapes: dict[str, Any] = {"prefill_seq_len": 4, "ctx_len": 24, "full_batch_size": 2, "kv_cache_batch_size": 3}
        out = tmp_path / str(number)
        model.compile(target=target, emit_only=target == "ai100", pipeline=text, compile_dir=out, **shapes)
        settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "repetition_penalty": 1.4}
        found.append(model.generate(ids, adapters=["one", None], **settings))
        assert not torch.equal(model.generate(ids, adapters=[None, "one"], **settings), found[-1])
    assert torch.equal(*found)
