"""The memory file: exact, small on demand, and refused when it is not what it should be."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file
from torch import Tensor

import nestlearn as nl
from nestlearn.adaptation import adaptation_of, read_memory, write_memory
from nestlearn.adaptation.codec import decode, encode, size_of
from nestlearn.adaptation.operations import diff, merge, prune
from nestlearn.adaptation.stored import digest
from tests.adaptation.conftest import TEXT, logits, tiny_model

OTHER = "The tram to Velm leaves at six from the harbour."


def learner_of(tokenizer: Any, seed: int = 0, slots: int = 100, **settings: Any) -> Any:
    model = tiny_model(seed=seed)
    levels = [nl.Level(period=8), nl.Level(period=32, half_life=500.0)]
    nl.adapt(model, levels, rank=16, slots=slots)
    return nl.Learner(model, tokenizer, lr=0.5, repeats=1, **settings)


def content_of(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["content"])


def rewrite(path: Path, content: Any = None, tensors: Any = None, **metadata: str) -> None:
    """Alter a file and give it a valid checksum again, as an attacker would."""
    with safe_open(path, framework="pt") as file:
        old = dict(file.metadata())
    tensors = load_file(path) if tensors is None else tensors
    text = old["content"] if content is None else json.dumps(content)
    sums = digest(text, tensors)
    save_file(tensors, path, {**old, "content": text, "sha256": sums, **metadata})


@pytest.fixture
def stored(tokenizer: Any, tmp_path: Path) -> tuple[Any, Path]:
    """A learner that has learned, and its file."""
    learner = learner_of(tokenizer)
    learner.learn(TEXT)
    path = tmp_path / "me.nlmem"
    learner.save(path)
    return learner, path


def test_learning_goes_on_bit_for_bit(tokenizer: Any, stored: Any, ids: Tensor) -> None:
    learner, path = stored
    other = learner_of(tokenizer)
    other.load(path)
    assert torch.equal(logits(other, ids), logits(learner, ids))
    for one in (learner, other):
        one.learn("What happened next is told in another book.")
    assert torch.equal(logits(other, ids), logits(learner, ids))
    a, b = learner.memory, other.memory
    assert a.counts == b.counts and a.optimizer["clocks"] == b.optimizer["clocks"]
    assert other.undo() == "before learning"
    assert other.undo() == "before learning"
    assert torch.equal(logits(other, ids), tiny_model()(ids).logits)


def test_it_says_what_it_holds(stored: Any) -> None:
    learner, path = stored
    memory = read_memory(path)
    assert memory.names == ("every 8", "every 32")
    assert memory.levels == learner.levels and memory.layout == learner.memory.layout
    assert memory.counts["documents"] == 1 and len(memory.snapshots) == 1
    assert abs(memory.created - time.time()) < 3600
    assert list(load_file(path)) and "pickle" not in path.read_bytes()[:200].decode("latin1")


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8", "rank:3"])
def test_codec(storage: str) -> None:
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(20, 3, generator=generator) @ torch.randn(3, 14, generator=generator)
    parts = encode(low, storage)
    back = decode(parts, storage, (20, 14))
    error = {"float32": 0.0, "bfloat16": 4e-3, "int8": 1e-2, "rank:3": 3e-2}[storage]
    assert (back - low).norm() <= error * low.norm()
    assert sum(t.nbytes for t in parts.values()) == size_of((20, 14), storage)
    assert not decode(encode(torch.zeros(4, 5), storage), storage, (4, 5)).any()
    with pytest.raises(ValueError, match="shape|missing"):
        decode(parts, storage, (20, 15))


def test_rank_beyond_the_matrix_and_unknown_storage() -> None:
    tensor = torch.randn(3, 4)
    assert (decode(encode(tensor, "rank:8"), "rank:8", (3, 4)) - tensor).norm() < 0.05
    for storage in ("pickle", "rank:0", "rank:-1", "rank:"):
        with pytest.raises(ValueError, match="unknown storage"):
            encode(tensor, storage)


def test_a_budget_is_kept_at_the_least_loss(tokenizer: Any, stored: Any, ids: Tensor) -> None:
    learner, path = stored
    exact = path.stat().st_size
    errors = []
    sizes = [exact + 40_000, 60_000, 42_000, 36_000]
    for limit in sizes:
        small = path.with_name("small.nlmem")
        report = learner.save(small, limit)
        assert small.stat().st_size == report.nbytes <= limit
        other = learner_of(tokenizer)
        other.load(small)
        errors.append((logits(other, ids) - logits(learner, ids)).abs().max().item())
        assert other.memory.optimizer["clocks"] == learner.memory.optimizer["clocks"]
        other.learn(TEXT)
    assert errors[0] == 0 and errors == sorted(errors)
    assert errors[-1] < (logits(learner, ids) - tiny_model()(ids).logits).abs().max()
    with pytest.raises(ValueError, match="needs at least .* bytes"):
        learner.save(path, 1000)
    assert path.stat().st_size == exact


def test_another_base_model_is_refused(tokenizer: Any, stored: Any, ids: Tensor) -> None:
    _, path = stored
    stranger = learner_of(tokenizer, seed=1)
    before = logits(stranger, ids)
    with pytest.raises(ValueError, match="does not fit: it belongs to another base model"):
        stranger.load(path)
    assert torch.equal(logits(stranger, ids), before)
    # The same model in another type of numbers is no other model.
    model = tiny_model(dtype=torch.bfloat16)
    nl.adaptation.adapt_to(model, read_memory(path))
    nl.Learner(model, tokenizer, memory=read_memory(path)).learn("and so on and on")


@pytest.mark.parametrize("keep", [0, 7, 8, 100, 5000, -1])
def test_a_truncated_file_is_refused(tokenizer: Any, stored: Any, keep: int, ids: Tensor) -> None:
    learner, path = stored
    before = logits(learner, ids)
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    with pytest.raises(ValueError, match="no memory file, or was cut off"):
        learner.load(path)
    assert torch.equal(logits(learner, ids), before)


def test_any_flipped_byte_is_noticed(stored: Any) -> None:
    _, path = stored
    data = bytearray(path.read_bytes())
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(8, len(data), (60,), generator=generator).tolist()
    for place in places:
        data[place] ^= 0x10
        path.write_bytes(data)
        with pytest.raises(ValueError):
            read_memory(path)
        data[place] ^= 0x10
    path.write_bytes(data)
    read_memory(path)


def _absurd_shape(content: dict[str, Any]) -> None:
    name = next(iter(content["layout"]["shapes"]))
    content["layout"]["shapes"][name] = [1 << 20, 1 << 20]


def _many_numbers(content: dict[str, Any]) -> None:
    shapes = content["layout"]["shapes"]
    for i in range(9):
        shapes[f"x{i}"] = [1 << 15, 1 << 15]


def _set(*keys: Any, value: Any) -> Any:
    def change(content: dict[str, Any]) -> None:
        place: Any = content
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value

    return change


HOSTILE = {
    "absurd shape": _absurd_shape,
    "too many numbers": _many_numbers,
    "negative shape": lambda c: c["layout"]["shapes"].update(w=[-1, 4]),
    "path as a target": lambda c: c["layout"]["shapes"].update({"../../etc/passwd": [2, 2]}),
    "path as a level": lambda c: c["changes"].update({"../x": []}),
    "no changes": lambda c: c.pop("changes"),
    "changes of nothing": lambda c: c["changes"].update({"every 8": ["nowhere"]}),
    "unknown storage": _set("storage", value="pickle"),
    "unknown level setting": lambda c: c["levels"][0].update(code="import os"),
    "period of zero": lambda c: c["levels"][0].update(period=0),
    "levels are text": _set("levels", value="abc"),
    "counts are text": _set("counts", value={"tokens": "many"}),
    "negative counts": _set("counts", value={"tokens": -1}),
    "layout is a list": _set("layout", value=[]),
    "method is a number": _set("layout", "method", value=3),
    "rank is a float": _set("layout", "rank", value=2.5),
    "keys of another": _set("layout", "fixed", value="0" * 32),
    "optimizer is a list": _set("optimizer", value=[1]),
    "optimizer names a tensor": _set("optimizer", value={"tensor": "nothing"}),
    "created is not finite": _set("created", value=float("nan")),
    "snapshot without changes": lambda c: c["snapshots"][0].pop("changes"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(stored: Any, name: str, ids: Tensor) -> None:
    learner, path = stored
    before = logits(learner, ids)
    content = content_of(path)
    HOSTILE[name](content)
    rewrite(path, content)
    with pytest.raises(ValueError, match="damaged or was not written by nestlearn"):
        read_memory(path)
    with pytest.raises(ValueError):
        learner.load(path)
    assert torch.equal(logits(learner, ids), before)


def test_numbers_that_are_not_finite_are_refused(stored: Any) -> None:
    _, path = stored
    tensors = load_file(path)
    name = next(n for n in tensors if n.startswith("changes/"))
    tensors[name][0, 0] = float("nan")
    rewrite(path, tensors=tensors)
    with pytest.raises(ValueError, match="not finite"):
        read_memory(path)


def test_hostile_optimizer_states_are_refused(tokenizer: Any, stored: Any) -> None:
    _, path = stored
    memory = read_memory(path)
    name = next(iter(memory.optimizer["state"]))
    for bad in (
        {"clocks": {"every 8": [-5, 0]}},
        {"clocks": {"every 8": ["x", 0]}},
        {"state": {name: {"exp_avg": torch.zeros(999)}}},
    ):
        altered = memory.copy()
        altered.optimizer |= bad
        learner = learner_of(tokenizer)
        with pytest.raises(ValueError):
            learner.use(altered)
        assert learner.memory.is_empty


def test_other_files_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    learner = learner_of(tokenizer)
    path = tmp_path / "x.nlmem"
    save_file({"w": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="is a safetensors file, but no memory file"):
        learner.load(path)
    torch.save({"w": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="no memory file"):
        learner.load(path)
    with pytest.raises(FileNotFoundError):
        learner.load(tmp_path / "none.nlmem")
    with pytest.raises(ValueError, match="named \\*.nlmem"):
        learner.save(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="no folder"):
        learner.save(tmp_path / "none" / "x.nlmem")


def test_newer_versions_are_refused(stored: Any) -> None:
    _, path = stored
    rewrite(path, version="2")
    with pytest.raises(ValueError, match="format version '2', this nestlearn reads up to 1"):
        read_memory(path)


def test_a_write_that_fails_leaves_the_old_file(stored: Any, monkeypatch: Any) -> None:
    learner, path = stored
    before = path.read_bytes()
    learner.learn(TEXT)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space"):
        learner.save(path)
    assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 1


@pytest.mark.slow
def test_kill_leaves_the_old_or_the_new_file(tmp_path: Path) -> None:
    """A process that saves without pause is killed at random moments."""
    script = textwrap.dedent(
        """
        import sys, torch
        from nestlearn.adaptation import Layout, Memory, write_memory
        from nestlearn.levels.level import Level
        layout = Layout("b", "placement", 0, "", {"w": (400, 400)})
        n = 0
        while True:
            n += 1
            changes = {"every 8": {"w": torch.full((400, 400), float(n))}}
            memory = Memory(layout, (Level(8, error="online"),), {}, changes, {"tokens": n})
            write_memory(memory, sys.argv[1])
            print(n, flush=True)
        """
    )
    path = tmp_path / "k.nlmem"
    seen = set()
    for delay in (0.013, 0.031, 0.052, 0.077, 0.11):
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        process.stdout.readline()  # the first save is done
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        memory = read_memory(path)
        count = memory.counts["tokens"]
        assert torch.equal(memory.changes["every 8"]["w"], torch.full((400, 400), float(count)))
        seen.add(count)
    assert max(seen) > 1


def test_merge_keeps_the_pairs_of_all(tokenizer: Any, ids: Tensor) -> None:
    first, second = (learner_of(tokenizer, slots=300) for _ in range(2))
    first.learn(TEXT)
    first_only = first.memory.copy()
    second.use(first.memory.copy())  # the same keys to begin with, then others
    second.learn("The harbour master of Lund sold his boat to a painter.")
    both = merge([first_only, second.memory], [1.0, 0.5])
    assert both.counts["tokens"] == first_only.counts["tokens"] + second.memory.counts["tokens"]

    def pairs(memory: Any) -> dict[bytes, Tensor]:
        (keys,) = memory.changes["keys"].values()
        values = torch.stack([next(iter(memory.changes[n].values())) for n in memory.names])
        taken = keys.any(-1).nonzero()[:, 0].tolist()
        return {keys[i].numpy().tobytes(): values[:, i] for i in taken}

    a, b, c = pairs(first_only), pairs(second.memory), pairs(both)
    assert set(a) < set(b) == set(c)
    for key, values in c.items():
        expected = a.get(key, torch.zeros(2, 1)) + 0.5 * b[key]
        torch.testing.assert_close(values, expected)
    first.use(both)
    assert logits(first, ids).isfinite().all()
    # More pairs than slots: the strongest stay.
    few = learner_of(tokenizer, slots=20)
    others = [few.memory.copy() for text in (TEXT[:30], TEXT[30:60]) if few.learn(text)]
    few.reset()
    few.learn(OTHER)
    small = pairs(merge([*others, few.memory]))
    assert len(small) <= 20 and all(set(small) - set(pairs(m)) for m in others)


def test_diff_compares_pairs_of_the_same_key(tokenizer: Any) -> None:
    learner = learner_of(tokenizer)
    learner.learn(TEXT)
    memory = learner.memory.copy()
    moved = memory.copy()
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    for own in moved.changes.values():
        for name, tensor in own.items():
            own[name] = tensor[order]
    assert all(row.distance < 1e-5 for row in diff(memory, moved))
    learner.learn("The harbour master of Lund sold his boat to a painter.")
    assert all(row.distance > 0.1 for row in diff(memory, learner.memory))


def test_diff(tokenizer: Any) -> None:
    learner = learner_of(tokenizer)
    learner.learn(TEXT)
    once = learner.memory.copy()
    (row, slow) = diff(once, merge([once, once]))
    assert row.level == "every 8" and row.cosine == pytest.approx(1) == slow.cosine
    assert row.second == pytest.approx(2 * row.first) and row.distance == pytest.approx(row.first)
    other = learner_of(tokenizer, seed=2)
    with pytest.raises(ValueError, match="memory 2 cannot be compared.*another base model"):
        diff(once, other.memory)
    with pytest.raises(ValueError, match="needs two memories"):
        merge([once])
    with pytest.raises(ValueError, match="as many finite weights"):
        merge([once, once], [1.0])


def test_prune(tokenizer: Any, stored: Any, tmp_path: Path) -> None:
    learner, path = stored
    memory = learner.memory
    small = prune(memory, snapshots=0, momenta=True, levels=["every 32"])
    assert not small.snapshots and not small.changes["every 32"] and small.changes["every 8"]
    assert small.optimizer["clocks"] == memory.optimizer["clocks"] and memory.snapshots
    assert write_memory(small, tmp_path / "s.nlmem").nbytes < path.stat().st_size / 2
    other = learner_of(tokenizer)
    other.load(tmp_path / "s.nlmem")
    other.learn(TEXT)
    with pytest.raises(ValueError, match="no level 'x'; there are: every 8, every 32"):
        prune(memory, levels=["x"])
    with pytest.raises(ValueError, match="snapshots must be 0 or more"):
        prune(memory, snapshots=-1)


def test_placement_memories_are_stored_too(tokenizer: Any, tmp_path: Path, ids: Tensor) -> None:
    def make() -> Any:
        model = tiny_model(dtype=torch.bfloat16)
        nl.adapt(model, [nl.Level(period=8), nl.Level(period=32)], method="placement", frozen=0.5)
        return nl.Learner(model, tokenizer, lr=1e-3)

    learner = make()
    learner.learn([TEXT] * 3)
    path = tmp_path / "p.nlmem"
    learner.save(path)
    other = make()
    other.load(path)
    assert torch.equal(logits(other, ids), logits(learner, ids))
    model = nl.adaptation.adapt_to(tiny_model(dtype=torch.bfloat16), read_memory(path))
    assert adaptation_of(model).method == "placement"
