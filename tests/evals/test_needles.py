"""Needles in a haystack: the prompts against RULER's definition read back from their text."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from nestlearn.evals import needles, needles_trained
from nestlearn.evals.harness.experiment import Request
from nestlearn.evals.harness.results import Results
from nestlearn.evals.harness.systems import Size
from nestlearn.evals.harness.task import IGNORE, TRAIN, VALIDATION
from nestlearn.evals.haystack import Haystack, encode, insert, sentences_of
from nestlearn.evals.needles import TASKS, Generator, contained, evaluate
from nestlearn.train.tokenizers import train_bpe

STORY = " ".join(f"The {w} went home at {w} o'clock. It was late!" for w in needles.NOUNS[:30])
NEEDLE = re.compile(r"One of the special magic (numbers|uuids) for ([a-z]+-[a-z]+) is: ([\w-]+)\.")


@pytest.fixture(scope="module")
def bpe() -> Any:
    return train_bpe([STORY, *needles.ADJECTIVES], 400, digits=True)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_prompts_are_what_the_task_says(task: str, kind: str, tokenizer: Any, bpe: Any) -> None:
    chosen = tokenizer if kind == "bytes" else bpe
    made = Generator(chosen, Haystack(chosen, sentences_of(STORY)))
    rules = TASKS[task]
    for seed, length in enumerate((1_000, 1_001, 1_777)):
        example = made.draw(task, length, np.random.default_rng(seed))
        assert example.prompt.shape == (length,)
        text = chosen.decode(example.prompt)
        found = NEEDLE.findall(text)
        assert len(found) == rules.keys * rules.values
        assert len({key for _, key, _ in found}) == rules.keys
        form = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}" if rules.uuids else r"[1-9]\d{6}"
        assert all(re.fullmatch(form, v) for _, _, v in found)
        assert ("The grass is green." in text) == (not rules.text)
        question = text.rsplit("\n", 1)[1]
        asked = re.findall(r"[a-z]+-[a-z]+", question.split("?")[0])
        assert len(asked) == rules.queries
        # The values of the words asked for, word by word, each as the text has them.
        right = [v for word in asked for _, key, v in found if key == word]
        assert list(example.answers) == right
        assert question.endswith(" are" if len(right) > 1 else " is")


def test_all_places_and_all_questions_are_used(bpe: Any) -> None:
    made = Generator(bpe, Haystack(bpe, sentences_of(STORY)))
    rng = np.random.default_rng(0)
    depths, ranks = [], []
    for _ in range(80):
        example = made.draw("niah_multikey_1", 1_200, rng)
        found = NEEDLE.findall(bpe.decode(example.prompt))
        values = [v for _, _, v in found]
        ranks.append(values.index(example.answers[0]))
        text = bpe.decode(example.prompt)
        depths.append(text.index(example.answers[0]) / len(text))
    assert min(np.bincount(ranks, minlength=4)) >= 8
    assert min(depths) < 0.2 and max(depths) > 0.7


def test_a_prompt_that_is_too_short_says_what_is_needed(tokenizer: Any) -> None:
    made = Generator(tokenizer)
    with pytest.raises(ValueError, match="needs at least (\\d+)") as error:
        made.draw("niah_single_1", 20, np.random.default_rng(3))
    needed = int(re.findall(r"at least (\d+)", str(error.value))[0])
    again = made.draw("niah_single_1", needed, np.random.default_rng(3))
    assert len(again.prompt) == needed
    with pytest.raises(ValueError, match="Haystack"):
        made.draw("niah_single_2", 900, np.random.default_rng(0))
    with pytest.raises(ValueError, match="niah_single_1"):
        made.draw("niah", 900, np.random.default_rng(0))


def test_training_draws_again_where_needles_are_too_long(tokenizer: Any) -> None:
    made, task = Generator(tokenizer), "niah_single_1"
    rng = np.random.default_rng(4)
    lengths = sorted(  # what other needles of the task need
        int(re.findall(r"at least (\d+)", str(_raised(made, task, rng)))[0]) for _ in range(40)
    )
    assert lengths[0] < lengths[-1]
    for _ in range(20):
        example = needles_trained.fitting(made, task, lengths[10], rng)
        assert len(example.prompt) == lengths[10]
    with pytest.raises(needles.TooLong):
        needles_trained.fitting(made, task, 20, rng)


def _raised(made: Generator, task: str, rng: np.random.Generator) -> Exception:
    with pytest.raises(needles.TooLong) as error:
        made.draw(task, 20, rng)
    return error.value


def test_a_window_is_the_endless_text(bpe: Any) -> None:
    sentences = list(sentences_of(STORY))[:7]
    hay = Haystack(bpe, sentences)
    pieces = encode(bpe, [" " + s for s in sentences])
    endless = np.concatenate([np.asarray(p) for p in pieces * 40])
    rng = np.random.default_rng(0)
    for length in (0, 1, 5, 100, 3 * len(hay) + 2):
        tokens, places = hay.window(length, rng)
        assert len(tokens) == length and places[-1] == length
        ends = np.cumsum([len(p) for p in pieces * 40])
        fits = [e for e in ends if e >= length and (endless[e - length : e] == tokens).all()]
        assert fits
        inside = [e - fits[0] + length for e in (0, *ends) if fits[0] - length <= e <= fits[0]]
        assert any(
            places.tolist() == [e - f + length for e in (0, *ends) if f - length <= e <= f]
            for f in fits
        ), inside


def test_insert_keeps_everything_in_order() -> None:
    rng = np.random.default_rng(0)
    tokens = np.arange(50)
    places = sorted(rng.integers(0, 51, size=6).tolist())
    pieces = [[100 + i] * (i + 1) for i in range(6)]
    whole = np.concatenate(insert(tokens, places, pieces))
    assert whole[whole < 100].tolist() == list(range(50))
    for piece, place in zip(pieces, places, strict=True):
        at = int(np.flatnonzero(whole == piece[0])[0])
        assert (whole[:at] < 100).sum() == place


def test_the_score_is_the_share_of_answers_contained() -> None:
    assert (
        contained("1111111 2222222 4444444", ["1111111", "2222222", "3333333", "4444444"]) == 0.75
    )
    assert contained("ABC-D", ["abc-d"]) == 1.0


class Reader(torch.nn.Module):
    """Finds the values in the text itself, and writes the first ``share`` of them."""

    device = torch.device("cpu")

    def __init__(self, tokenizer: Any, share: float) -> None:
        super().__init__()
        self.tokenizer, self.share = tokenizer, share

    def generate(self, ids: torch.Tensor, **given: Any) -> torch.Tensor:
        rows = []
        for row in ids:
            found = [v for _, _, v in NEEDLE.findall(self.tokenizer.decode(row))]
            said = " and ".join(found[: round(self.share * len(found))])
            rows.append(self.tokenizer(said).input_ids[: given["max_new_tokens"]])
        width = max(map(len, rows))
        padded = [r + [given["pad_token_id"]] * (width - len(r)) for r in rows]
        return torch.cat([ids, torch.tensor(padded, dtype=torch.long)], 1)


def test_evaluate_scores_what_a_model_writes(tokenizer: Any) -> None:
    text = Haystack(tokenizer, sentences_of(STORY))
    given = {"text": text, "count": 5, "batch": 2}
    assert evaluate(Reader(tokenizer, 1), tokenizer, "niah_multivalue", 900, **given) == 1
    assert evaluate(Reader(tokenizer, 0.5), tokenizer, "niah_multivalue", 900, **given) == 0.5
    assert evaluate(Reader(tokenizer, 0), tokenizer, "niah_single_1", 900, **given) == 0
    # Only what fits into the tokens that may be written counts.
    short = evaluate(Reader(tokenizer, 1), tokenizer, "niah_multivalue", 900, **given, new_tokens=7)
    assert short == 0.25
    with pytest.raises(ValueError, match="count"):
        evaluate(Reader(tokenizer, 1), tokenizer, "niah_single_1", 900, count=0)


@pytest.fixture
def novels(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "english_novels"
    folder.mkdir()
    (folder / "Other_Book_1900.txt").write_text(STORY, encoding="utf-8")
    (folder / "Gaskell_Ruth_1855.txt").write_text("Ruth sat. Ruth ran. " * 40, encoding="utf-8")
    monkeypatch.setenv("NESTLEARN_DATA", str(tmp_path))


def test_training_batches_ask_for_the_reply_alone(novels: None) -> None:
    task = needles_trained.NeedleMixture((200, 400, 800), (800,), 420, 20_000)
    tokenizer, _, held = task.materials()
    assert "Ruth" in tokenizer.decode(held.tokens)
    seen = set()
    for seed in range(6):
        batch = task.draw(TRAIN, 2, torch.Generator().manual_seed(seed))
        length = int(batch.asked.int().argmax(1).min()) + 1
        seen.add((len(batch), length))
        for row in range(len(batch)):
            text = tokenizer.decode(batch.inputs[row, :length])
            assert "Ruth" not in text
            reply = [t for t in batch.targets[row].tolist() if t != IGNORE]
            assert reply[-1] == tokenizer.eos_token_id
            words = re.findall(r"[\w-]+", tokenizer.decode(reply[:-1]))
            assert words and all(f"is: {w}." in text for w in words)
    assert seen == {(4, 400), (2, 800)}


def test_lessons_grow_from_one_needle_to_all_tasks(novels: None) -> None:
    task = needles_trained.NeedleMixture((200, 400, 800), (800,), 420, 20_000)
    tokenizer, _, _ = task.materials()
    for progress, counts, words in ((0.0, {4}, {1}), (0.3, {2}, {1, 4}), (0.99, {1, 2}, {1, 4})):
        taught = task.at(progress)
        seen, answers = set(), set()
        for seed in range(12):
            batch = taught.draw(TRAIN, 1, torch.Generator().manual_seed(seed))
            seen.add(len(batch))
            for targets in batch.targets:
                reply = tokenizer.decode([t for t in targets.tolist() if t != IGNORE][:-1])
                answers.add(reply.count(",") + 1)
        assert (seen, answers) == (counts, words)
    held = [t.draw(VALIDATION, 4, torch.Generator().manual_seed(0)) for t in (task, task.at(0.0))]
    assert torch.equal(held[0].inputs, held[1].inputs)


def test_the_experiment_runs_and_reports(
    novels: None, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = needles_trained.NeedlePlan(
        Size(16, 1, 2), steps=2, batch=1, lrs=(1e-3,), weight_decays=(0.0,), seeds=1,
        systems=("gated_deltanet",), examples=1, trained=(300,), tested=(300,), vocab_size=420,
        characters=20_000,
    )  # fmt: skip
    monkeypatch.setattr(needles_trained.NeedlesTrained, "plans", {"tiny": plan})
    monkeypatch.setattr(needles_trained, "ROOM", 2)
    experiment = needles_trained.NeedlesTrained("tiny")
    results = Results(tmp_path / "r.json", "?", {})
    (name, cell), *more = experiment.due(results, Request()).items()
    assert not more
    results.add(name, experiment.measure(cell))
    assert experiment.due(results, Request()) == {}
    (table,) = experiment.tables(results)
    assert len(table.columns) == 7 and table.rows[0][1].startswith("0.0")
    assert experiment.plot(results, tmp_path / "r.png")
    assert "300: 0 0 0 0 0 0" in experiment.summary(SimpleNamespace(**results.get(name)).__dict__)


def test_every_digit_is_a_token(bpe: Any) -> None:
    assert bpe.tokenize("is 1900.")[-5:] == ["1", "9", "0", "0", "."]
