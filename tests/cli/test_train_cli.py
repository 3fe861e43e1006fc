"""`nestlearn train` as a user calls it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nestlearn.cli.main import main
from nestlearn.train import list_checkpoints, read_log

SMALL = [
    "--preset", "tiny", "--mixer", "attention", "--set", "hidden_size=32",
    "--set", "intermediate_size=64", "--set", "cms_periods=[1,3]", "--seq-len", "32",
    "--batch-size", "4", "--option", "eval_sequences=4", "--option", "log_every=1",
]  # fmt: skip


@pytest.fixture(autouse=True)
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NESTLEARN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"{n} plus {n % 7} is {n + n % 7}." for n in range(3000)))
    return path


def train(*arguments: str, data: str = "text.txt", out: str = "out") -> int:
    return main(["train", "--data", data, "--out", out, *SMALL, *arguments])


def test_train_and_continue(tmp_path: Path, capsys) -> None:
    assert train("--steps", "6") == 0
    assert train("--steps", "9", "--log", "tensorboard") == 0
    output = capsys.readouterr().out
    assert "tiny model, mixer attention" in output and "levels: every step" in output
    assert "continuing from step-00000006" in output
    assert [r["step"] for r in read_log("out", "step")] == list(range(1, 10))
    assert list(Path("out/tensorboard").iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        p.name for p in Path("out/final").iterdir()
    }


def test_defaults_come_from_the_size(monkeypatch) -> None:
    from nestlearn.cli.train import Train

    config = Train(data=("x",), preset="140m", lr=0.5, option=("warmup=7", "betas=(0.8,0.9)"))
    values = config._config()
    assert (values.seq_len, values.batch_size, values.lr) == (1024, 32, 0.5)
    assert (values.warmup, values.betas) == (7, (0.8, 0.9))
    assert values.out == "runs/140m-self_modifying"


def test_fresh_bpe_is_kept_when_the_run_continues(tmp_path: Path, capsys) -> None:
    assert train("--steps", "2", "--tokenizer", "bpe:290") == 0
    vocabulary = load_file("out/final/model.safetensors")["model.embed_tokens.weight"].shape[0]
    assert vocabulary == 290
    assert train("--steps", "3", "--tokenizer", "bpe:290") == 0
    output = capsys.readouterr().out
    assert output.count("training a tokenizer") == 1 and "continuing from" in output
    assert read_log("out", "eval")[-1]["bits_per_byte"] > 0
    assert train("--steps", "2", "--tokenizer", "out/final", out="other") == 0


def test_val_data_and_compile_flag(tmp_path: Path, monkeypatch) -> None:
    Path("val.jsonl").write_text('{"body": "' + "held out " * 100 + '"}\n')
    Path("data.jsonl").write_text('{"body": "' + "trained on " * 200 + '"}\n')
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda m, **kw: compiled.append(m) or m)
    assert train("--steps", "2", "--val-data", "val.jsonl", "--text-column", "body", "--compile",
                 data="data.jsonl") == 0  # fmt: skip
    assert compiled


@pytest.mark.parametrize(("arguments", "message"), [
    (["--data", "missing.txt"], "no such file or folder: missing.txt"),
    (["--data", "empty.txt"], "empty.txt is empty"),
    (["--data", "binary.dat"], "binary.dat is a binary file"),
    (["--data", "short.txt"], "too little data: 6 tokens"),
    (["--data", "rows.jsonl"], "no column 'text'; there are: body (choose with --text-column)"),
    (["--preset", "huge"], "unknown preset 'huge'; choose one of tiny, small"),
    (["--mixer", "self_modifyin"], "self_modifying"),
    (["--set", "hiden_size=3"], "has no field 'hiden_size'; did you mean hidden_size"),
    (["--set", "hidden_size"], "write key=value"),
    (["--set", "hidden_size=33"], "hidden_size must be a multiple of"),
    (["--set", "vocab_size=100"], "vocab_size 100 is smaller than the tokenizer's 259"),
    (["--set", "max_position_embeddings=16"], "seq_len 32 exceeds max_position_embeddings=16"),
    (["--option", "warmpu=3"], "--option warmpu: no such setting; did you mean warmup"),
    (["--option", "clip=0"], "clip must be a number above 0"),
    (["--steps", "0"], "steps must be a number >= 1"),
    (["--seq-len", "1"], "seq_len must be"),
    (["--batch-size", "3", "--accumulate", "2"], "multiple of accumulate=2"),
    (["--tokenizer", "bpe:many"], "write bpe:N"),
    (["--tokenizer", "./nowhere"], "no tokenizer './nowhere'"),
    (["--device", "gpu"], "no device 'gpu'"),
    (["--resume", "nowhere"], "--resume nowhere: no checkpoint there"),
])  # fmt: skip
def test_mistakes_end_in_one_clear_line(arguments: list[str], message: str, capsys) -> None:
    Path("empty.txt").touch()
    Path("binary.dat").write_bytes(b"\0\1\2")
    Path("short.txt").write_text("short")
    Path("rows.jsonl").write_text('{"body": "x"}\n')
    steps = [] if "--steps" in arguments else ["--steps", "2"]
    assert train(*arguments, *steps) == 1
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1
    assert "Traceback" not in error


def test_nan_ends_in_one_clear_line(capsys) -> None:
    assert train("--steps", "30", "--lr", "1e30", "--option", "warmup=0",
                 "--option", "nonfinite=stop", "--option", "clip=1e30") == 1  # fmt: skip
    captured = capsys.readouterr()
    assert "stopped" in captured.err and "lower --lr" in captured.err
    assert len(captured.err.strip().splitlines()) == 1


def test_other_settings_in_the_same_folder_are_refused(capsys) -> None:
    assert train("--steps", "2") == 0
    for arguments, message in [
        (["--resume", "never"], "already holds checkpoints"),
        (["--seed", "3"], "other data"),
        (["--set", "num_hidden_layers=1"], "another model"),
    ]:
        assert train("--steps", "4", *arguments) == 1
        assert message in capsys.readouterr().err


# -- processes that are killed --------------------------------------------------------------------

STEPS = 90


def start(tmp_path: Path, out: str, *more: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                   "PYTHONPATH": str(Path(__file__).parents[2] / "src")}  # fmt: skip
    command = [sys.executable, "-m", "nestlearn.cli.main", "train", "--data", "text.txt",
               "--out", out, *SMALL, "--steps", str(STEPS), "--save-every", "7",
               "--eval-every", "50", *more]  # fmt: skip
    return subprocess.Popen(command, env=environment, cwd=tmp_path, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def wait_for_step(process: subprocess.Popen, out: Path, step: int) -> None:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        log = out / "log.jsonl"
        if log.is_file() and log.read_bytes().count(b"\n") >= step:
            return
        time.sleep(0.005)
    raise AssertionError(f"never reached step {step}: {process.communicate()}")


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    output, error = process.communicate(timeout=200)
    return process.returncode, output, error


def test_killed_and_interrupted_runs_continue_bit_exactly(tmp_path: Path) -> None:
    straight = start(tmp_path, "straight")
    broken = start(tmp_path, "broken")
    wait_for_step(broken, tmp_path / "broken", 20)
    broken.send_signal(signal.SIGKILL)
    broken.communicate()
    assert 14 <= len(read_log(tmp_path / "broken", "step")) < STEPS
    assert list_checkpoints(tmp_path / "broken" / "checkpoints")

    broken = start(tmp_path, "broken")
    wait_for_step(broken, tmp_path / "broken", 45)
    broken.send_signal(signal.SIGINT)
    code, output, error = finish(broken)
    assert code == 130, error
    assert "continuing from step-" in output and "interrupted: step" in output
    assert "Traceback" not in error
    assert len(read_log(tmp_path / "broken", "step")) < STEPS

    code, output, error = finish(start(tmp_path, "broken"))
    assert code == 0, error
    assert finish(straight)[0] == 0
    curves = [[(r["step"], r["loss"], r["grad_norm"]) for r in read_log(tmp_path / out, "step")]
              for out in ("straight", "broken")]  # fmt: skip
    assert curves[0] == curves[1] and len(curves[0]) == STEPS
    name = f"checkpoints/step-{STEPS:08d}"
    for file in ("model.safetensors", "state.safetensors"):
        a, b = (load_file(tmp_path / out / name / file) for out in ("straight", "broken"))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
