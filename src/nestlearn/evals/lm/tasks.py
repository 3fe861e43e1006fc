"""lm-eval's tasks on data sets of the hub, or on the same data sets in local files.

A local file takes the place of the data set alone: prompts, targets and metrics are those of
lm-eval's own definition of the task. Its rows are given the columns that the hub's data set has.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from nestlearn.evals.harness.data import data_path, data_root

STATE_POLICY = "reset per request"
"""What of a model's state goes from one request to the next: nothing."""
Source = Literal["auto", "local", "hub"]
Row = dict[str, Any]

LANGUAGE = (
    "wikitext", "lambada_openai", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge",
    "social_iqa", "boolq",
)  # fmt: skip
"""Table 2: language modelling and common sense."""
RECALL = ("swde", "nq_open", "drop", "fda", "squad_completion", "triviaqa")
"""Table 3: in-context recall, from the hub."""
GROUPS = {"table2": LANGUAGE, "table3": RECALL}
"""Names for several tasks at once."""
METRIC = {
    "wikitext": "word_perplexity", "lambada_openai": "acc", "piqa": "acc", "hellaswag": "acc_norm",
    "winogrande": "acc", "arc_easy": "acc", "arc_challenge": "acc_norm", "social_iqa": "acc",
    "boolq": "acc", "openbookqa": "acc_norm", "squad": "contains", "swde": "contains",
    "fda": "contains", "squad_completion": "contains", "drop": "f1", "nq_open": "exact_match",
    "triviaqa": "exact_match",
}  # fmt: skip
"""The metric of a task that tables show."""


@dataclasses.dataclass(frozen=True)
class Local:
    """A data set in a local file.

    Attributes:
        file: below the folder of data sets.
        rows: the file's rows with the hub's columns.
        note: how it differs from the hub's, if it does.
    """

    file: str
    rows: Callable[[Path], Iterator[Row]]
    note: str = ""


def _lines(path: Path) -> Iterator[Row]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def _piqa(path: Path) -> Iterator[Row]:
    for row in _lines(path):
        first, second = row["choices"]
        yield {"goal": row["question"], "sol1": first, "sol2": second, "label": row["label"]}


def _letters(path: Path) -> Iterator[Row]:
    """ARC and OpenBookQA: choices have letters."""
    for row in _lines(path):
        letters = [chr(ord("A") + i) for i in range(len(row["choices"]))]
        yield {
            "question": row["question"],
            "question_stem": row["question"],
            "choices": {"text": row["choices"], "label": letters},
            "answerKey": letters[row["label"]],
        }


def _hellaswag(path: Path) -> Iterator[Row]:
    for row in _lines(path):
        activity, _, context = row["question"].partition(": ")
        # The hub has the unfinished last sentence apart; lm-eval makes its first letter a capital.
        whole = re.fullmatch(r"(.*[.?!\]\"'])\s+(.*?)", context, re.DOTALL)
        finished, begun = context, ""
        if whole and not context.rstrip().endswith((".", "?", "!", "]", '"')):
            finished, begun = whole[1], whole[2]
        yield {
            "activity_label": activity,
            "ctx_a": finished,
            "ctx_b": begun,
            "endings": row["choices"],
            "label": str(row["label"]),
        }


def _winogrande(path: Path) -> Iterator[Row]:
    for row in _lines(path):
        first, second = row["choices"]
        yield {
            "sentence": row["sentence"],
            "option1": first,
            "option2": second,
            "answer": str(row["label"] + 1),
        }


def _siqa(path: Path) -> Iterator[Row]:
    for row in _lines(path):
        # The prompt joins both parts with a space: any cut at a space gives the same prompt.
        context, _, question = row["question"].partition(" ")
        answers = dict(zip(("answerA", "answerB", "answerC"), row["choices"], strict=True))
        yield {"context": context, "question": question, **answers, "label": str(row["label"] + 1)}


def _boolq(path: Path) -> Iterator[Row]:
    for row in _lines(path):
        label = int(row["label"])
        yield {"question": row["question"], "passage": row["passage"], "label": label}


def _wikitext(path: Path) -> Iterator[Row]:
    """Articles: a first-level heading, ``= Title =``, starts one."""
    article: list[str] = []
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            if re.fullmatch(r" = [^=].*[^=] = \n", line) and "".join(article).strip():
                yield {"page": "".join(article)}
                article = []
            article.append(line)
    if article:
        yield {"page": "".join(article)}


def _squad(path: Path) -> Iterator[Row]:
    """One question about each passage: the first whose answer stands there."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        passages = json.load(file)
    for passage in passages:
        for asked in passage["questions"]:
            if asked["answer"] in passage["context"]:
                found = {k: passage[k] for k in ("title", "context")}
                yield {**found, "question": asked["question"], "value": asked["answer"]}
                break


LOCAL: dict[str, Local] = {
    "wikitext": Local(
        "wikitext2/test.txt.gz", _wikitext,
        "the word-level text with <unk>; the hub's is raw: perplexities do not compare",
    ),
    "lambada_openai": Local("lambada/lambada_test.jsonl.gz", _lines),
    "piqa": Local("commonsense/piqa_valid.jsonl.gz", _piqa),
    "hellaswag": Local(
        "commonsense/hellaswag_val.jsonl.gz", _hellaswag,
        "where a context's unfinished sentence begins is inferred",
    ),
    "winogrande": Local("commonsense/winogrande_dev.jsonl.gz", _winogrande),
    "arc_easy": Local("commonsense/arc_easy_test.jsonl.gz", _letters),
    "arc_challenge": Local("commonsense/arc_challenge_test.jsonl.gz", _letters),
    "social_iqa": Local("commonsense/siqa_dev.jsonl.gz", _siqa),
    "boolq": Local("commonsense/boolq_dev.jsonl.gz", _boolq),
    "openbookqa": Local("commonsense/openbookqa_test.jsonl.gz", _letters),
    "squad": Local(
        "squad_knowledge/squad_val.json.gz", _squad,
        "a prompt of ours; one question a passage; the hub's squad_completion asks in other words",
    ),
}  # fmt: skip
"""Tasks whose data may be in local files."""


def _contains(document: Row, results: list[str]) -> dict[str, float]:
    return {"contains": float(document["value"].lower() in results[0].lower())}


# In-context recall without the hub; scored like lm-eval's SWDE, FDA and SQuAD: the answer is
# contained in a short continuation, upper or lower case.
_SQUAD: Row = {
    "task": "squad",
    "output_type": "generate_until",
    "doc_to_text": "Title: {{title}}\n\n{{context}}\n\nQuestion: {{question}}\nAnswer:",
    "doc_to_target": "value",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 48, "do_sample": False},
    "process_results": _contains,
    "metric_list": [{"metric": "contains", "aggregation": "mean", "higher_is_better": True}],
    "metadata": {"version": 1.0},
}


def expand(names: tuple[str, ...]) -> tuple[str, ...]:
    """Names with `GROUPS` written out, each once.

    Example:
        >>> expand(("piqa", "table3"))[:3]
        ('piqa', 'swde', 'nq_open')
    """
    listed = [name for given in names for name in GROUPS.get(given, (given,))]
    return tuple(dict.fromkeys(listed))


def where(name: str, source: Source) -> Literal["local", "hub"]:
    """Where a task's data is taken from.

    Args:
        source: ``"auto"`` prefers a local file where there is one.

    Raises:
        ValueError: no local file of the task.
    """
    local = LOCAL.get(name)
    if local is None:
        if source == "local":
            raise ValueError(f"no local data for {name!r}; there is for {', '.join(LOCAL)}")
        return "hub"
    if source == "local" or name == "squad":
        data_path(local.file)
        return "local"
    if source == "auto" and (data_root() / local.file).is_file():
        return "local"
    return "hub"


def load_task(name: str, source: Source, manager: Any) -> list[Any]:
    """The lm-eval task, or tasks, of a name.

    Args:
        name: a task, group or tag of lm-eval, or ``"squad"``.
        source: see `where`. manager: lm-eval's ``TaskManager``.

    Raises:
        ValueError: an unknown name, or data that cannot be had.
    """
    import difflib

    if where(name, source) == "local":
        return [_local_task(name, manager)]
    known = manager.all_tasks
    if name not in known:
        near = difflib.get_close_matches(name, [*known, *LOCAL, *GROUPS], n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "see `lm_eval ls tasks`"
        raise ValueError(f"no task {name!r}; {hint}")
    try:
        return list(manager.load([name])["tasks"].values())
    except (OSError, ConnectionError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"the data of {name!r} cannot be had from the hub ({first}); set NESTLEARN_DATA "
            "(or --data) to a folder that has it" + ("" if name in LOCAL else ", or go online")
        ) from error


def _local_task(name: str, manager: Any) -> Any:
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    local = LOCAL[name]
    path = data_path(local.file)

    def dataset(**ignored: Any) -> dict[str, Any]:
        from datasets import Dataset

        return {"test": Dataset.from_list(list(local.rows(path)))}

    if name == "squad":
        config = dict(_SQUAD)
    else:
        # There is no public way to read a definition without fetching its data set.
        config = dict(load_yaml(manager.task_index[name].yaml_path, resolve_func=True))
    for key in ("tag", "dataset_path", "dataset_name", "training_split", "validation_split",
                "fewshot_split"):  # fmt: skip
        config.pop(key, None)
    config |= {"custom_dataset": dataset, "test_split": "test", "dataset_kwargs": None}
    log = logging.getLogger("lm_eval.api.task")
    before = log.level
    log.setLevel(logging.ERROR)  # a warning that such data sets can be given options
    try:
        return ConfigurableTask(config=config)
    finally:
        log.setLevel(before)
