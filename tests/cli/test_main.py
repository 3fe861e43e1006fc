"""The command line: quick help, near matches, one-line errors, interrupts and closed pipes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

import nestlearn
from nestlearn.cli import main as cli

SRC = Path(nestlearn.__file__).resolve().parents[1]


def run_command(*args: str, code: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code] if code else [sys.executable, "-m", "nestlearn", *args]
    environment = {**os.environ, "PYTHONPATH": str(SRC)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> int:
    """Exit status of a sub-command that raises ``error`` inside the package."""

    @dataclass
    class Failing:
        def run(self) -> int:
            raise error

    command = cli.Command("nestlearn.cli.main", "Failing", "fails")
    monkeypatch.setitem(cli.COMMANDS, "fail", command)
    monkeypatch.setattr(cli, "Failing", Failing, raising=False)
    return cli.main(["fail"])


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, command in cli.COMMANDS.items():
        assert name in text
        assert command.summary in text


def test_every_command_exists() -> None:
    import importlib

    for command in cli.COMMANDS.values():
        assert callable(getattr(importlib.import_module(command.module), command.cls).run)


def test_help_is_quick_and_imports_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['nestlearn', '--help']; from nestlearn.cli.main import main; "
        "status = main(); print('torch' in sys.modules, 'transformers' in sys.modules); "
        "sys.exit(status)"
    )
    times = []
    for _ in range(3):
        started = time.perf_counter()
        done = run_command(code=code)
        times.append(time.perf_counter() - started)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "False False"
    assert min(times) < 0.5


@pytest.mark.parametrize(
    "given", [{}, {"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "ACTIVE"}], ids=str
)
def test_threads_wait_briefly_unless_told_otherwise(
    given: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["--version"]) == 0
    wanted = {} if "OMP_WAIT_POLICY" in given else {"GOMP_SPINCOUNT": cli.SPINS}
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        assert os.environ.get(name) == (wanted | given).get(name)


def test_module_is_the_command() -> None:
    done = run_command("--version")
    assert (done.returncode, done.stdout) == (0, f"nestlearn {nestlearn.__version__}\n")


def test_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian"]) == 2
    assert "did you mean `train`?" in capsys.readouterr().err
    assert cli.main(["xyzzy"]) == 2
    assert "doctor" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (FileNotFoundError(2, "No such file or directory", "x.txt"), "x.txt"),
        (PermissionError(13, "Permission denied", "y.txt"), "Permission denied: y.txt"),
        (OSError("no model here\nsee the manual"), "no model here see the manual"),
    ],
)
def test_file_errors_are_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: OSError,
    line: str,
) -> None:
    monkeypatch.delenv("NESTLEARN_DEBUG", raising=False)
    assert fail_with(monkeypatch, error) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert line in captured.err
    assert captured.err.count("\n") == 1


def test_our_value_errors_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("NESTLEARN_DEBUG", raising=False)
    assert cli.main(["bench", "no-such-benchmark"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("nestlearn: error: ")
    assert error.count("\n") == 1


def test_debug_shows_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NESTLEARN_DEBUG", "1")
    assert cli.main(["bench", "no-such-benchmark"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_library_s_value_error_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("NESTLEARN_DEBUG", raising=False)
    # Raised from this file, which is not part of the package: a bug, not a mistake of the user.
    assert fail_with(monkeypatch, ValueError("deep inside")) == 1
    assert "Traceback" in capsys.readouterr().err


def test_interrupt_is_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fail_with(monkeypatch, KeyboardInterrupt()) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_closed_pipe_is_silent() -> None:
    read, write = os.pipe()
    os.close(read)
    environment = {**os.environ, "PYTHONPATH": str(SRC)}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "nestlearn", "--help"],
            stdout=write,
            stderr=subprocess.PIPE,
            env=environment,
            text=True,
            timeout=60,
        )
    finally:
        os.close(write)
    assert done.returncode == 141
    assert done.stderr == ""


def test_bench_without_a_checkout_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from nestlearn.cli import bench

    monkeypatch.setattr(bench, "__file__", str(tmp_path / "a" / "b" / "c" / "bench.py"))
    with pytest.raises(ValueError, match="checkout"):
        bench.Bench("train").run()


def test_bench_hands_flags_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from nestlearn.cli import bench

    main = "if __name__ == '__main__':"
    (tmp_path / "echo_count.py").write_text(f"import sys\n{main} sys.exit(len(sys.argv[1:]))")
    (tmp_path / "helper.py").write_text("")
    (tmp_path / "worker_echo.py").write_text(main)
    monkeypatch.setattr(bench, "benchmark_folder", lambda: tmp_path)
    assert list(bench.benchmarks()) == ["echo_count"]
    assert bench.Bench.from_arguments(["echo", "--width", "64", "--help"]).run() == 3
    with pytest.raises(ValueError, match="echo_count"):
        bench.Bench("helper").run()
