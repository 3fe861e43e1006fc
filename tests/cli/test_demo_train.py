"""The demo's parts on a few kilobytes; the whole of it is `make demo`."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from nestlearn.cli import demo_train as demo
from nestlearn.cli.demo_text import (
    Corpus,
    bigram_bits,
    excerpts,
    lzma_bits,
    standard_library,
    zlib_bits,
)
from nestlearn.models.hope import HopeConfig, HopeForCausalLM


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return standard_library(validation_bytes=4096, training_bytes=65_536)


@pytest.fixture
def model() -> HopeForCausalLM:
    torch.manual_seed(0)
    return HopeForCausalLM(HopeConfig.preset("tiny", mixer="gated_deltanet")).eval()


def test_corpus_is_the_same_each_time_and_disjoint(corpus: Corpus) -> None:
    again = standard_library(validation_bytes=4096, training_bytes=65_536)
    assert again == corpus
    assert corpus.validation[:512] not in corpus.training
    assert b"def " in corpus.training


def test_corpus_without_sources_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs the .py files"):
        standard_library(root=tmp_path)


def test_bigram_bits_by_hand() -> None:
    # After "a" training saw "b" three times: P(b|a) = 4/259, P(a|b) = 3/258 (b was followed twice).
    found = bigram_bits(b"ababab", [b"aba"])
    assert found == pytest.approx((8 - math.log2(4 / 259) - math.log2(3 / 258)) / 3)


def test_coders_on_repetition() -> None:
    assert zlib_bits([b"abcd" * 1000]) < 0.1
    assert lzma_bits([b"abcd" * 10_000]) < 0.1


def test_coders_start_anew_with_each_excerpt() -> None:
    noise = bytes(torch.randint(256, (1000,), dtype=torch.uint8).tolist())
    pieces = excerpts(noise + noise, 1000)
    assert pieces == [noise, noise]
    assert zlib_bits(pieces) > 7.9 and lzma_bits(pieces) > 7.9
    assert zlib_bits([noise + noise]) < 4.5 and lzma_bits([noise + noise]) < 4.5


def test_bits_per_byte_is_the_models_loss(model: HopeForCausalLM, corpus: Corpus) -> None:
    text = corpus.validation[:300]
    ids = torch.tensor([[demo.BOS, *text]])
    with torch.no_grad():
        expected = model(input_ids=ids, labels=ids).loss.item() / math.log(2)
    assert demo.bits_per_byte(model, text) == pytest.approx(expected, rel=1e-4)


def test_bits_per_byte_counts_an_uneven_text_once(
    model: HopeForCausalLM, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "EXCERPT", 34)
    text = corpus.validation[:100]
    pieces = excerpts(text, 34)
    bits = sum(demo.bits_per_byte(model, piece) * len(piece) for piece in pieces)
    assert demo.bits_per_byte(model, text) == pytest.approx(bits / 100, rel=1e-4)


def test_schedule_rises_then_falls() -> None:
    values = [demo.schedule(i / 100) for i in range(101)]
    assert max(values) == pytest.approx(1.0)
    assert values[0] < 0.1
    assert values[-1] == pytest.approx(0.02)


def test_windows_begin_with_bos() -> None:
    text = demo.as_tokens(bytes(range(50)))
    rows = demo.windows(text, 64, 8, torch.Generator().manual_seed(0))
    assert rows.shape == (64, 8)
    assert (rows[:, 0] == demo.BOS).all()
    assert (rows[:, 2:] - rows[:, 1:-1] == 1).all()
    assert rows[:, 1:].max() <= 49


def test_stream_keeps_the_state_constant(model: HopeForCausalLM, corpus: Corpus) -> None:
    reports = demo.stream(model, corpus.training, 5_000, Console(quiet=True))
    assert [report.position for report in reports][-1] == 5_000
    assert len({report.state_bytes for report in reports}) == 1


@pytest.mark.slow
def test_whole_demo(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = HopeConfig.preset("tiny")
    monkeypatch.setattr(demo, "demo_config", lambda mixer: tiny)
    corpus = standard_library(validation_bytes=8192, training_bytes=65_536)
    monkeypatch.setattr(demo, "standard_library", lambda: corpus)
    out = tmp_path / "model"
    assert demo.DemoTrain(minutes=0.1, stream_tokens=4096, out=out).run() == 0
    text = capsys.readouterr().out
    for word in ("zlib", "bigram", "lzma", "time per token", "nestlearn generate"):
        assert word in text
    assert "def " in AutoTokenizer.from_pretrained(out).decode(list(b"def f"))
    assert AutoModelForCausalLM.from_pretrained(out).config.model_type == "hope"


def test_bad_flags_are_user_errors() -> None:
    with pytest.raises(ValueError, match="--minutes"):
        demo.DemoTrain(minutes=0.0).run()
