"""nestlearn generate: prompts, memory files, mistakes."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from nestlearn.cli.generate import Generate
from nestlearn.models.hope import HopeCache, HopeConfig, HopeForCausalLM
from nestlearn.train.tokenizers import ByteTokenizer


def saved(folder: Path, mixer: str) -> Path:
    HopeForCausalLM(HopeConfig.preset("tiny", mixer=mixer)).save_pretrained(folder)
    ByteTokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path):
    return saved(tmp_path / "model", "self_modifying")


def test_continues_a_prompt_with_a_seed(folder, capsys, monkeypatch):
    for _ in range(2):
        assert Generate(folder, prompt="def f(", max_new_tokens=12, seed=3).run() == 0
    monkeypatch.setattr("sys.stdin", io.StringIO("def f("))
    assert Generate(folder, prompt="-", max_new_tokens=12, seed=3).run() == 0
    out = capsys.readouterr().out
    assert out and out[: len(out) // 3] * 3 == out


@pytest.mark.parametrize("how", [{"stream": True}, {"num_beams": 2}, {"temperature": 0.0}])
def test_ways_to_generate(folder, how, capsys):
    assert Generate(folder, prompt="abc", max_new_tokens=5, **how).run() == 0
    assert capsys.readouterr().out.endswith("\n")


@pytest.mark.parametrize("beams", [1, 2])
def test_memory_is_kept_between_calls(folder, tmp_path, beams, capsys):
    file = tmp_path / "memory.safetensors"
    settings = {"max_new_tokens": 5, "temperature": 0.0, "memory": file, "num_beams": beams}
    assert Generate(folder, prompt="first", **settings).run() == 0
    model = HopeForCausalLM.from_pretrained(folder)
    tokens = HopeCache.load(file, model).get_seq_length()
    assert 6 <= tokens <= 10  # the prompt and everything generated (an end token may come early)
    assert Generate(folder, prompt="second", **settings).run() == 0
    assert HopeCache.load(file, model).get_seq_length() > tokens + 6
    before = file.read_bytes()
    assert Generate(folder, prompt="third", freeze=True, **settings).run() == 0
    assert file.read_bytes() == before
    assert "new memory" in capsys.readouterr().err


def test_a_long_prompt_is_read_after_a_short_memory(folder, tmp_path):
    file = tmp_path / "memory.safetensors"
    settings = {"max_new_tokens": 1, "temperature": 0.0, "memory": file}
    Generate(folder, prompt="ab", **settings).run()
    Generate(folder, prompt="a much longer text", **settings).run()
    model = HopeForCausalLM.from_pretrained(folder)
    assert HopeCache.load(file, model).get_seq_length() == 3 + 18 + 1


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"max_new_tokens": 0}, "max-new-tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top-p"),
        ({"top_k": -1}, "top-k"),
        ({"num_beams": 0}, "num-beams"),
        ({"num_beams": 2, "stream": True}, "stream"),
        ({"freeze": True}, "freeze"),
        ({"memory": Path("no/such/folder/m.safetensors")}, "no folder"),
    ],
)
def test_mistakes_in_flags(tmp_path, wrong, said):
    with pytest.raises(ValueError, match=said):
        Generate(tmp_path, **{"prompt": "x", **wrong}).run()


def test_a_training_run_stands_for_its_latest_model(tmp_path, capsys):
    settings = {"prompt": "x", "max_new_tokens": 1}
    for name in ("checkpoints/step-00000002", "checkpoints/step-00000010", "best", "final"):
        saved(tmp_path / "run" / name, "attention")
        Generate(tmp_path / "run", **settings).run()
        assert f"model: {tmp_path / 'run' / name}" in capsys.readouterr().err


def test_mistakes_in_the_folder(tmp_path, folder):
    with pytest.raises(ValueError, match="no folder"):
        Generate(tmp_path / "none", prompt="x").run()
    with pytest.raises(ValueError, match="there is one in"):
        Generate(tmp_path, prompt="x").run()
    for file in folder.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ValueError, match="no weights"):
        Generate(folder, prompt="x").run()


def test_attention_cannot_be_frozen(tmp_path):
    folder, file = saved(tmp_path / "model", "attention"), tmp_path / "memory.safetensors"
    Generate(folder, prompt="x", max_new_tokens=1, memory=file).run()
    with pytest.raises(ValueError, match="nothing to freeze"):
        Generate(folder, prompt="x", max_new_tokens=1, memory=file, freeze=True).run()
