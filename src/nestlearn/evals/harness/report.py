"""Tables on the terminal, and reports in Markdown and HTML."""

from __future__ import annotations

import html
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nestlearn.evals.harness.experiment import Experiment, Table
from nestlearn.evals.harness.results import Results, machine, shown, table


def print_tables(tables: Sequence[Table]) -> None:
    """Print tables and their notes."""
    for one in tables:
        table(one.title, one.columns, one.rows)
        if one.note:
            print(one.note)


def write_report(experiment: Experiment, results: Results) -> list[Path]:
    """Write plot, Markdown and HTML beside the result file; returns the files written.

    Without matplotlib there is no plot, and a warning says so.
    """
    path = results.path
    plot = path.with_suffix(".png")
    try:
        drawn = experiment.plot(results, plot)
    except ImportError as error:
        if error.name != "matplotlib":
            raise
        warnings.warn('no plot: pip install "nestlearn[bench]" brings matplotlib', stacklevel=2)
        drawn = False
    markdown, page = path.with_suffix(".md"), path.with_suffix(".html")
    picture = plot.name if drawn else None
    markdown.write_text(as_markdown(experiment, results, picture), encoding="utf-8")
    page.write_text(as_html(experiment, results, picture), encoding="utf-8")
    return [*([plot] if drawn else []), markdown, page]


def facts(experiment: Experiment, results: Results) -> list[tuple[str, str]]:
    """What every report says about how it was measured."""
    record, rows = results.record, results.record["rows"]
    failed = [r["cell"] for r in rows if "error" in r]
    seeds = sorted({r["seed"] for r in rows if "seed" in r and not r.get("tuning")})
    # Old rows have no command and machine of their own, and need not be of the file's last run.
    known = {k: [r[k] for r in rows if k in r] for k in ("command", "machine", "commit")}
    commands = list(dict.fromkeys(known["command"])) or [record["command"]]
    machines = list(dict.fromkeys(known["machine"])) or [machine(record["hardware"])]
    if 0 < len(known["machine"]) < len(rows):
        machines.append(f"not recorded for {len(rows) - len(known['machine'])} cells")
    commits = list(dict.fromkeys(known["commit"])) or [record["commit"]]
    return [
        ("question", experiment.question),
        ("scale", experiment.scale),
        ("seeds", ", ".join(map(str, seeds or record["seeds"]))),
        *(("command", command) for command in commands),
        ("machine", " / ".join(machines)),
        ("commits", ", ".join(commits)),
        ("last measured", record["date"]),
        ("cells", f"{len(rows)} measured, {len(failed)} failed"),
        *(("failed", name) for name in failed),
    ]


def as_markdown(experiment: Experiment, results: Results, picture: str | None) -> str:
    """The report as Markdown."""
    lines = [f"# {experiment.item}: {experiment.title}", ""]
    lines += [f"- {name}: {_plain(value)}" for name, value in facts(experiment, results)]
    for one in experiment.tables(results):
        lines += ["", f"## {one.title}", ""]
        lines.append("| " + " | ".join(map(_plain, one.columns)) + " |")
        lines.append("|---" * len(one.columns) + "|")
        for row in one.rows:
            lines.append("| " + " | ".join(_plain(shown(value)) for value in row) + " |")
        if one.note:
            lines += ["", one.note]
    if picture:
        lines += ["", f"![{experiment.title}]({picture})"]
    return "\n".join(lines) + "\n"


def as_html(experiment: Experiment, results: Results, picture: str | None) -> str:
    """The report as a page that needs nothing but the plot beside it."""
    title = html.escape(f"{experiment.item}: {experiment.title}")
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
        "<style>body{font:16px sans-serif;max-width:70em;margin:2em auto;padding:0 1em}"
        "table{border-collapse:collapse;margin:1em 0}th,td{padding:.25em .7em;text-align:right;"
        "border-bottom:1px solid #ddd}th:first-child,td:first-child{text-align:left}"
        "img{max-width:100%}</style></head><body>",
        f"<h1>{title}</h1><dl>",
    ]
    parts += [
        f"<dt><b>{html.escape(name)}</b></dt><dd>{html.escape(value)}</dd>"
        for name, value in facts(experiment, results)
    ]
    parts.append("</dl>")
    for one in experiment.tables(results):
        parts.append(f"<h2>{html.escape(one.title)}</h2><table><tr>")
        parts += [f"<th>{html.escape(column)}</th>" for column in one.columns]
        parts.append("</tr>")
        for row in one.rows:
            parts.append("<tr>" + "".join(f"<td>{_cell(value)}</td>" for value in row) + "</tr>")
        parts.append("</table>")
        if one.note:
            parts.append(f"<p>{html.escape(one.note)}</p>")
    if picture:
        parts.append(f'<img src="{html.escape(picture)}" alt="{title}">')
    return "\n".join([*parts, "</body></html>"]) + "\n"


def _cell(value: Any) -> str:
    return html.escape(shown(value))


def _plain(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", " ")
