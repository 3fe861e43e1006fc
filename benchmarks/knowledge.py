"""Knowledge incorporation: passages read once in a stream; recall, forgetting and damage.

A pre-trained model reads passages (SQuAD), one after the other. Afterwards it is asked with the
book closed; its perplexity on unrelated text (WikiText-2 validation) and, along the stream, on the
first passages says what it lost. Settings are chosen on passages of their own (the tuning seed) by
three rules, for every method alike: `recall`, the best recall (log-probability of cloze answers)
whatever it costs; `careful`, `gentle` and `frugal`, the best recall among those that raise the
perplexity of unrelated text by at most 3%, 1% and 0.25%.

    python benchmarks/knowledge.py --model FOLDER --jobs 2              # everything (resumes)
    python benchmarks/knowledge.py --model FOLDER --methods nestlearn naive --passages 20
"""

from __future__ import annotations

import gzip
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import Results, arguments, data_root, out_path, table
from torch import Tensor

from nestlearn.evals.harness.parallel import in_parallel

TUNING_SEED = 1000
TUNING_PASSAGES = 20
# How much the perplexity of unrelated text may rise on the tuning passages.
RULES = {"frugal": 1.0025, "gentle": 1.01, "careful": 1.03, "recall": math.inf}


def grid(lrs: tuple[float, ...], **more: Any) -> list[dict[str, Any]]:
    """Settings that differ in the learning rate."""
    return [{"lr": lr, **more} for lr in lrs]


ALL_WEIGHTS = (5e-5, 1e-4, 2e-4, 4e-4)
MEMORIES = (0.1, 0.2, 0.4, 0.8)
GRIDS: dict[str, list[dict[str, Any]]] = {
    "naive": grid(ALL_WEIGHTS),
    "lora": grid((2.5e-4, 5e-4, 1e-3, 2e-3), rank=16),
    "ewc": [*grid(ALL_WEIGHTS[:2], ewc=1e4), *grid(ALL_WEIGHTS[1:3], ewc=1e5)],
    "replay": grid(ALL_WEIGHTS[:3], replay=0.5),
    "nestlearn": grid(MEMORIES),
    "nestlearn_sentences": grid((0.05, *MEMORIES[:3]), sentences=True),
    "naive_sentences": grid((2.5e-5, *ALL_WEIGHTS[:3]), sentences=True),
    "nestlearn_1_level": grid(MEMORIES, periods=(64,)),
    "placement": grid(ALL_WEIGHTS, method="placement"),
    "frozen": [{}],
    "in_context": [{}],
}
SLOTS = 16_384  # about as many places as 100 passages have; twice that with their sentences
CURVE = 10  # points of the forgetting curve
CHAT = ("chat_accuracy", "chat_log_prob")  # the questions, in the tokenizer's chat template


def unrelated(tokenizer: Any, tokens: int) -> Tensor:
    """WikiText-2 validation."""
    path = data_root() / "wikitext2" / "valid.txt.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        text = file.read(tokens * 6)
    for mark, plain in ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", ".")):
        text = text.replace(mark, plain)
    return torch.tensor(tokenizer(text, add_special_tokens=False).input_ids[:tokens])


def teacher(
    method: str, model: Any, tokenizer: Any, setting: dict[str, Any], repeats: int, seed: int
) -> Any:
    """(model to ask, function that reads a document)."""
    import nestlearn as nl
    from nestlearn.adaptation.documents import sentences_of
    from nestlearn.adaptation.keys import generate_text
    from nestlearn.evals.methods import FineTuning

    if method in ("frozen", "in_context"):
        return model, lambda text: None
    if method.startswith("nestlearn") or method == "placement":
        periods = setting.get("periods", (64, 512, 4096))
        scales = setting.get("scales", [1.0] * len(periods))
        levels = [nl.Level(period=p, lr_scale=s) for p, s in zip(periods, scales, strict=True)]
        kind = setting.get("method", "added")
        sentences = setting.get("sentences", False)
        nl.adapt(model, levels, method=kind, slots=SLOTS * (1 + sentences), seed=seed)
        learner = nl.Learner(
            model, tokenizer, lr=setting["lr"], repeats=repeats, sentences=sentences, snapshots=0
        )
        return model, learner.learn
    given = {"lora" if k == "rank" else k: v for k, v in setting.items() if k != "sentences"}
    if "ewc" in given:
        given["anchor"] = generate_text(model, seed=seed)
    taught = FineTuning(model, tokenizer, repeats=repeats, seed=seed, **given)

    def with_sentences(text: str) -> None:
        for one in (text, *sentences_of(text)):
            taught.learn(one)

    return taught.model, with_sentences if setting.get("sentences") else taught.learn


def run_cell(
    method: str, setting: dict[str, Any], seed: int, plan: dict[str, Any], tuning: bool
) -> dict[str, Any]:
    """Read the passages with one method, then ask."""
    from nestlearn.cli.pretrained import load_pretrained
    from nestlearn.evals import knowledge as task

    torch.manual_seed(seed)
    model, tokenizer = load_pretrained(plan["model_path"])
    data = data_root() / "squad_knowledge" / "squad_val.json.gz"
    passages = task.load_passages(data, plan["passages"], seed)
    other = unrelated(tokenizer, plan["unrelated_tokens"])
    asked, learn = teacher(method, model, tokenizer, setting, plan["repeats"], seed)

    def surprise(chosen: list[Any]) -> float:
        """Mean nats per token of passages, each read alone."""
        total = count = 0.0
        for passage in chosen:
            row = torch.tensor([[tokenizer.bos_token_id,
                                 *tokenizer(passage.document).input_ids]])  # fmt: skip
            with torch.no_grad():
                loss = asked(input_ids=row, labels=row, use_cache=False).loss.item()
            total, count = total + loss * (row.shape[1] - 1), count + row.shape[1] - 1
        return total / count

    before = task.perplexity(asked, other)
    first = passages[: max(1, len(passages) // CURVE)]
    curve = [[0, surprise(first)]]
    began, learning = time.perf_counter(), 0.0
    for i, passage in enumerate(passages, 1):
        start = time.perf_counter()
        learn(passage.document)
        learning += time.perf_counter() - start
        if i % len(first) == 0 and not tuning:
            curve.append([i, surprise(first)])
    row: dict[str, Any] = {"method": method, "setting": setting, "seed": seed, "tuning": tuning}
    cloze = [(p, item) for p in passages for item in p.cloze]
    questions = [(p, item) for p in passages for item in p.questions]
    opened = None
    if method == "in_context":
        cloze = [(p, (f"{p.document}\n\n{q}", a)) for p, (q, a) in cloze]
        opened = [p.document for p, _ in questions]
    found = task.cloze_scores(asked, tokenizer, [item for _, item in cloze])
    row |= {f"cloze_{k}": v for k, v in found.items()}
    if not tuning and plan.get("questions", True):
        for form in ("questions", *(["chat"] if tokenizer.chat_template else [])):
            found = task.question_scores(
                asked, tokenizer, [q for _, q in questions], passages=opened, chat=form == "chat"
            )
            row |= {f"{form}_{k}": v for k, v in found.items()}
    row |= {
        "perplexity_unrelated": task.perplexity(asked, other),
        "perplexity_before": before,
        "forgetting_curve_nats": curve,
        # From right after the first tenth was read to the end of the stream.
        "forgotten_nats": curve[-1][1] - curve[min(1, len(curve) - 1)][1],
        "cloze_items": len(cloze),
        "questions": len(questions),
        "learning_seconds": learning,
        "seconds": time.perf_counter() - began,
        "dtype": str(model.dtype),
    }
    return row


def chosen(results: Results, method: str, rule: str) -> dict[str, Any] | None:
    """The setting that a rule takes from the tuning passages; None if none is allowed."""
    rows = [r for r in results.rows(method=method, tuning=True) if "error" not in r]
    base = results.rows(method="frozen", tuning=True)[0]["perplexity_unrelated"]
    rows = [r for r in rows if r["perplexity_unrelated"] <= RULES[rule] * base]
    return max(rows, key=lambda r: r["cloze_log_prob"])["setting"] if rows else None


def finals(results: Results, method: str, rule: str) -> list[dict[str, Any]]:
    """The rows of the final passages of the setting that a rule takes."""
    setting = chosen(results, method, rule)
    rows = results.rows(method=method, tuning=False, setting=setting)
    return [r for r in rows if "error" not in r]


def summarise(results: Results) -> dict[str, Any]:
    """Means over seeds, and standard deviations."""
    summary: dict[str, Any] = {}
    keys = ("cloze_accuracy", "cloze_log_prob", "questions_accuracy", "questions_log_prob",
            "perplexity_unrelated", "forgotten_nats")  # fmt: skip
    for rule in RULES:
        for method in GRIDS:
            if not results.rows(method=method, tuning=True):
                continue
            rows = finals(results, method, rule)
            if not rows:
                continue
            asked = [k for k in CHAT if all(k in r for r in rows)]  # older rows were not
            entry = summary[f"{method}, {rule}"] = {
                k: statistics.fmean(r[k] for r in rows) for k in (*keys, *asked)
            }
            for k in ("cloze_accuracy", "perplexity_unrelated"):
                entry[f"{k}_sd"] = statistics.stdev([r[k] for r in rows]) if len(rows) > 1 else 0.0
            entry |= {"seeds": len(rows), "setting": rows[0]["setting"]}
    return summary


def plot(results: Results, path: Path) -> None:
    """Recall against damage (all points of the grids, and the final passages), forgetting."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (first, left, right) = plt.subplots(1, 3, figsize=(16, 4.5))
    base = results.rows(method="frozen", tuning=True)[0]["perplexity_unrelated"]
    for i, method in enumerate(m for m in GRIDS if m not in ("frozen", "in_context")):
        color = f"C{i}"
        tuned = [r for r in results.rows(method=method, tuning=True) if "error" not in r]
        lines: dict[str, list[tuple[float, float]]] = {}  # one for settings that differ in the rate
        for r in tuned:
            rest = named({k: v for k, v in r["setting"].items() if k not in ("lr", "rank")})
            rise = 100 * (r["perplexity_unrelated"] / base - 1)
            lines.setdefault(rest, []).append((rise, r["cloze_log_prob"]))
        for k, (rest, points) in enumerate(lines.items()):
            label = method if len(lines) == 1 else f"{method}, {rest}"
            first.plot(*zip(*sorted(points), strict=True), "os^"[k % 3] + "-", color=color,
                       label=label)  # fmt: skip
        rules: dict[str, list[str]] = {}  # setting -> those that choose it
        for rule in RULES if tuned else ():
            if rows := finals(results, method, rule):
                rules.setdefault(named(rows[0]["setting"]), []).append(rule)
        for which, (mark, line) in zip(
            rules.values(), (("o", "-"), ("s", ":"), ("^", "--"), ("D", "-.")), strict=False
        ):
            rows = finals(results, method, which[0])
            label = f"{method}, {' and '.join(which)}"
            left.scatter([r["perplexity_unrelated"] for r in rows],
                         [r["cloze_accuracy"] for r in rows], color=color, marker=mark,
                         label=label)  # fmt: skip
            curves = [r["forgetting_curve_nats"] for r in rows]
            means = [statistics.fmean(c[k][1] for c in curves) for k in range(len(curves[0]))]
            right.plot([p for p, _ in curves[0]], means, line, color=color, label=label)
    first.set(xlabel="perplexity of unrelated text, % above the base model", xlim=(-5, 60),
              ylabel="cloze log-probability", title="tuning passages, every setting")  # fmt: skip
    left.set(xlabel="perplexity of unrelated text", ylabel="cloze accuracy", title="final passages")
    right.set(xlabel="passages read", ylabel="nats per token of the first tenth",
              title="forgetting curve")  # fmt: skip
    left.set_xscale("log")
    left.minorticks_off()
    left.set_xticks((18, 20, 25, 30, 50, 100), ("18", "20", "25", "30", "50", "100"))
    first.legend(fontsize=7)
    right.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def run(results: Results, cells: dict[str, tuple], plan: dict[str, Any], jobs: int) -> None:
    """Measure the cells that are missing."""

    def done(cell: str, row: dict[str, Any]) -> None:
        results.add(cell, row)
        said = row.get("error") or (
            f"cloze {row['cloze_accuracy']:.3f} ({row['cloze_log_prob']:.3f}), unrelated "
            f"{row['perplexity_unrelated']:.3f}, {row['seconds']:.0f} s"
        )
        print(f"  {cell}: {said}", file=sys.stderr, flush=True)

    missing = {
        name: (method, setting, seed, plan, tuning)
        for name, (method, setting, seed, tuning) in cells.items()
        if not results.done(name)
    }
    in_parallel(run_cell, missing, jobs, done)


def named(setting: dict[str, Any]) -> str:
    """A setting as part of a cell's name."""
    return " ".join(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}"
                    for k, v in setting.items()) or "-"  # fmt: skip


def main() -> None:
    """Tune, run, print and store."""
    parser = arguments(__doc__, "knowledge", threads=1)
    parser.add_argument("--model", required=True, help="folder, .gguf file or hub id")
    parser.add_argument("--methods", nargs="*", default=list(GRIDS), choices=list(GRIDS))
    parser.add_argument("--rules", nargs="*", default=list(RULES), choices=RULES)
    parser.add_argument("--passages", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=4, help="gradient steps per document")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time, one thread each")
    parser.add_argument("--tune-only", action="store_true")
    args = parser.parse_args()
    passages = 4 if args.quick else args.passages
    tokens = 2048 if args.quick else 16_384
    results = Results(
        out_path(args),
        question="How much of passages read once is recalled, and what does it cost elsewhere?",
        settings={"passages": passages, "repeats": args.repeats, "unrelated_tokens": tokens,
                  "model": Path(args.model).name, "tuning_passages": TUNING_PASSAGES},
        seeds=list(range(args.seeds)),
        threads=1,
        fresh=args.fresh,
    )  # fmt: skip
    plan = {"repeats": args.repeats, "unrelated_tokens": tokens, "model_path": args.model}
    methods = ["frozen", *(m for m in args.methods if m != "frozen")]
    cells = {
        f"tune/{method}/{named(setting)}": (method, setting, TUNING_SEED, True)
        for method in methods
        for setting in (GRIDS[method][:1] if args.quick else GRIDS[method])
    }
    run(results, cells, plan | {"passages": min(passages, TUNING_PASSAGES)}, args.jobs)
    if not args.tune_only:
        cells = {
            f"final/{method}/{named(setting)}/seed{seed}": (method, setting, seed, False)
            for seed in range(args.seeds)
            for rule in args.rules
            for method in methods
            if (setting := chosen(results, method, rule)) is not None
        }
        run(results, cells, plan | {"passages": passages}, args.jobs)
    summary = summarise(results)
    results.summarise(summary)
    if summary:
        plot(results, out_path(args).with_suffix(".png"))
        columns = ("method, rule", "cloze", "log-prob", "questions", "log-prob", "as chat",
                   "log-prob", "unrelated", "forgotten", "setting", "n")  # fmt: skip
        rows = [
            (m, s["cloze_accuracy"], s["cloze_log_prob"], s["questions_accuracy"],
             s["questions_log_prob"], *(s.get(k, "") for k in CHAT),
             s["perplexity_unrelated"], s["forgotten_nats"],
             named(s["setting"]), s["seeds"])
            for m, s in summary.items()
        ]  # fmt: skip
        table("Closed-book recall and damage", columns, rows)
    tuned = [r for r in results.rows(tuning=True) if "error" not in r]
    table(
        "Tuning passages",
        ("method", "setting", "cloze", "log-prob", "unrelated"),
        [
            (r["method"], named(r["setting"]), r["cloze_accuracy"], r["cloze_log_prob"],
             r["perplexity_unrelated"])
            for r in tuned
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
