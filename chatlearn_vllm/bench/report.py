"""How are results shown: on the terminal, as plots, as one page?"""

from __future__ import annotations

import base64
import html
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chatlearn_vllm.bench.memory import gib

ENGINES_PNG = "throughput_by_engine.png"
GPUS_PNG = "throughput_by_gpus.png"
PAGE = "index.html"

_WIDTH = 130
"""Of a table that goes to a file."""

_CLEARLY = 0.05
"""Share by which the lengths of two cases' completions differ, so that it must be said."""

Results = Mapping[str, Any]


def write_report(results: Results, out: Path) -> None:
    """Write both plots and the page into a directory."""
    draw_engines(results, out / ENGINES_PNG)
    draw_gpus(results, out / GPUS_PNG)
    (out / PAGE).write_text(page(results, [out / ENGINES_PNG, out / GPUS_PNG]), encoding="utf-8")


def print_table(results: Results) -> None:
    """Print what was measured."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    for title, heading, rows in tables(results):
        table = Table(title=title, title_justify="left")
        for number, name in enumerate(heading):
            is_first = number == 0
            table.add_column(name, justify="left" if is_first else "right", no_wrap=is_first)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for line in remarks(results):
        console.print(line, markup=False, highlight=False)


def tables(results: Results) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, heading and rows of each table, as text; the first column names the case."""
    done = [case for case in results["cases"] if case["status"] == "ok"]
    found = []
    if done:
        heading = ["case", "GPUs", "output tokens/s", "requests/s", "measured on", "loading"]
        heading += ["device memory", "host memory"]
        found.append(("Throughput and memory", heading, [_throughput_row(case) for case in done]))
    if any(case["latency"] for case in done):
        heading = ["case", "requests", "time to first token", "between tokens", "whole request"]
        rows = [row for case in done if case["latency"] for row in _latency_rows(case)]
        found.append(("Latency, p50 / p90 / p99 in ms", heading, rows))
    if any(case["speculation"] for case in done):
        heading = ["case", "method", "tokens per draft", "acceptance rate", "tokens per step"]
        rows = [_speculation_row(case) for case in done if case["speculation"]]
        found.append(("Speculative decoding", heading, rows))
    if results["ratios"]:
        rows = [[one["case"], one["to"], f"{one['ratio']:.3f}"] for one in results["ratios"]]
        found.append(("Throughput compared", ["case", "with", "ratio"], rows))
    return found


def remarks(results: Results) -> list[str]:
    """What else a reader must know: what was left out, scaled, or has no effect."""
    lines = [f"note: {notice}" for notice in results["notices"]]
    of_cases: dict[str, list[str]] = {}
    for case in results["cases"]:
        for notice in case.get("notices", ()) if case["status"] == "ok" else ():
            of_cases.setdefault(notice, []).append(case["case"])
    lines += [f"note: {', '.join(cases)}: {notice}" for notice, cases in of_cases.items()]
    for case in results["cases"]:
        if case["status"] != "ok":
            remedy = f"; {case['remedy']}" if case.get("remedy") else ""
            reason = f": {case['reason']}{remedy}" if case["reason"] else ""
            lines.append(f"{case['case']} {case['status']}{reason}")
            continue
        throughput = case["throughput"]
        if throughput["is_scaled"]:
            tried = ", ".join(
                f"{one['batch_size']}: "
                + (f"{speed:,.0f}" if (speed := one["output_tokens_per_s"]) else "no memory")
                for one in case["batch_sizes"]
            )
            lines.append(
                f"{case['case']}: measured on {throughput['measured_completions']} of "
                f"{throughput['completions']} completions, the best batch size "
                f"({case['search_ended']}{f'; tokens/s {tried}' if tried else ''}); all would take "
                f"{throughput['seconds_for_all']:,.0f} s"
            )
    return lines + _unequal_lengths(results)


def _unequal_lengths(results: Results) -> list[str]:
    """Which cases were compared although the work of a completion was not the same."""
    lengths = {
        case["case"]: sum(one["output_tokens"] for one in case["throughput"]["passes"])
        / sum(one["completions"] for one in case["throughput"]["passes"])
        for case in results["cases"]
        if case["status"] == "ok"
    }
    return [
        f"{one['case']} made {lengths[one['case']]:,.1f} tokens per completion, {one['to']} "
        f"{lengths[one['to']]:,.1f}: not the same work; --ignore-eos gives all the same length"
        for one in results["ratios"]
        if abs(lengths[one["case"]] / max(lengths[one["to"]], 1e-9) - 1) > _CLEARLY
    ]


def _throughput_row(case: Mapping[str, Any]) -> list[str]:
    throughput, memory = case["throughput"], case["memory"]
    device = memory["device_bytes"]
    return [
        case["case"],
        str(case["num_gpus"]),
        f"{throughput['output_tokens_per_s']:,.0f}",
        f"{throughput['requests_per_s']:,.2f}",
        f"{len(throughput['passes'])} x {throughput['measured_completions']}",
        f"{case['load_s']:.1f} s",
        " + ".join(map(gib, device)) if device else "-",
        gib(memory["host_rss_bytes"]),
    ]


def _latency_rows(case: Mapping[str, Any]) -> list[list[str]]:
    return [
        [
            case["case"],
            f"{latency['num_requests']} {'one by one' if name == 'alone' else 'together'}",
            *(_milliseconds(latency[key]) for key in ("ttft_s", "inter_token_s", "request_s")),
        ]
        for name, latency in case["latency"].items()
    ]


def _milliseconds(summary: Mapping[str, float] | None) -> str:
    if summary is None:
        return "-"
    return " / ".join(f"{1000 * summary[name]:,.1f}" for name in ("p50", "p90", "p99"))


def _speculation_row(case: Mapping[str, Any]) -> list[str]:
    found = case["speculation"]
    rate, length = found["acceptance_rate"], found["mean_accepted_length"]
    return [
        case["case"],
        found["method"],
        str(found["num_speculative_tokens"]),
        "-" if rate is None else f"{rate:.3f}",
        "-" if length is None else f"{length:.2f}",
    ]


def draw_engines(results: Results, path: Path) -> None:
    """Output tokens per second of each case."""
    plt = _pyplot()
    done = [case for case in results["cases"] if case["status"] == "ok"]
    height = 1.5 + 0.45 * max(1, len(done))
    figure, axes = plt.subplots(figsize=(8, height), layout="constrained")
    names = [case["case"] for case in done]
    speeds = [case["throughput"]["output_tokens_per_s"] for case in done]
    bars = axes.barh(names, speeds, color=[_color(case["engine"]) for case in done])
    axes.bar_label(bars, [f"{speed:,.0f}" for speed in speeds], padding=3)
    axes.invert_yaxis()
    axes.set_xlim(right=1.2 * max(speeds, default=1))  # room for the numbers
    axes.set(xlabel="output tokens/s")
    figure.suptitle(_title(results))
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_gpus(results: Results, path: Path) -> None:
    """Output tokens per second against the number of GPUs, a line per engine and kind of split."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, points in lines_by_gpus(results["cases"]):
        axes.plot(*zip(*points, strict=True), "o-", label=name)
    axes.set(xlabel="GPUs", ylabel="output tokens/s", title=_title(results))
    axes.set_ylim(bottom=0)
    counts = sorted({case["num_gpus"] for case in results["cases"]})
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def lines_by_gpus(
    cases: Sequence[Mapping[str, Any]],
) -> list[tuple[str, list[tuple[int, float]]]]:
    """(name, points) of each line; cases on one GPU begin the lines of both splits."""
    done = [case for case in cases if case["status"] == "ok"]
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for case in done:
        groups.setdefault(":".join(_without_sizes(case)), []).append(case)
    lines = []
    for name, group in groups.items():
        splits = {
            "tensor parallel": [c for c in group if c["pipeline_parallel_size"] == 1],
            "pipeline parallel": [c for c in group if c["tensor_parallel_size"] == 1],
            "both": [
                c
                for c in group
                if c["tensor_parallel_size"] > 1 and c["pipeline_parallel_size"] > 1
            ],
        }
        several = {
            split: some
            for split, some in splits.items()
            if any(case["num_gpus"] > 1 for case in some)
        }
        for split, some in (several or {"": group}).items():
            points = sorted((c["num_gpus"], c["throughput"]["output_tokens_per_s"]) for c in some)
            lines.append((f"{name}, {split}" if split else name, points))
    return lines


def _without_sizes(case: Mapping[str, Any]) -> list[str]:
    return [part for part in case["case"].split(":") if not part.startswith(("tp=", "pp="))]


def _title(results: Results) -> str:
    gpus = results["machine"]["gpus"]
    device = gpus[0]["name"] if gpus else f"CPU, {results['machine']['num_cpus']} cores"
    options = results["options"]
    return (
        f"{_count(results['model']['num_parameters'])} parameters, "
        f"{options['prompts']} x {options['completions']} completions of {options['max_tokens']} "
        f"tokens\n{device}"
    )


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e8 else f"{number / 1e6:.2f} million"


def _color(engine: str) -> str:
    colors = {"vllm": "tab:blue", "vllm-module": "tab:orange"}
    return colors.get(engine, "tab:gray")


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def page(results: Results, plots: Sequence[Path]) -> str:
    """One HTML page that needs no other file.

    Args:
        results: of run.py.
        plots: PNG files to be put into the page.
    """
    parts = [f"<h1>{html.escape(_title(results))}</h1>", _paragraph(_setting(results))]
    for title, heading, rows in tables(results):
        parts.append(f"<h2>{html.escape(title)}</h2>{_html_table(heading, rows)}")
    if lines := remarks(results):
        items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
        parts.append(f"<h2>Remarks</h2><ul>{items}</ul>")
    for plot in plots:
        data = base64.b64encode(plot.read_bytes()).decode()
        parts.append(f'<img alt="{html.escape(plot.stem)}" src="data:image/png;base64,{data}">')
    details = html.escape(json.dumps(results, indent=1))
    parts.append(f"<details><summary>All numbers</summary><pre>{details}</pre></details>")
    return _PAGE.replace("BODY", "\n".join(parts))


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>chatlearn-vllm bench</title><style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em }
h1 { font-size: 1.3em; white-space: pre-line } h2 { font-size: 1.1em; margin-top: 2em }
table { border-collapse: collapse } th, td { border-bottom: 1px solid #ddd; padding: .3em .8em }
th, td { text-align: right } th:first-child, td:first-child { text-align: left }
img { display: block; margin: 2em 0; max-width: 100% } pre { overflow-x: auto }
</style></head><body>
BODY
</body></html>
"""


def _paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def _setting(results: Results) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    machine = results["machine"]
    gpus = f"{len(machine['gpus'])} x {machine['gpus'][0]['name']}" if machine["gpus"] else "no GPU"
    command = " ".join(results["command"])
    return (
        f"{results['model']['name']}. {gpus}, {machine['num_cpus']} cores of {machine['cpu']}. "
        f"{versions}. {results['started']}. Command: {command}"
    )


def _html_table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in heading)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"
