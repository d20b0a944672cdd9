"""What was found, for a terminal (a screen, never more), as findings.json and as a page that needs nothing else."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rayward import places
from rayward.errors import DataError
from rayward.hygiene.findings import SEVERITIES, Finding
from rayward.hygiene.summary import LENGTHS, Summary, bin_edge, length_quantile
from rayward.places import Place, at, telling

LINES = 40  # of a screen
BLUE, ORANGE, GREY = "#2563eb", "#ea580c", "#9ca3af"


def check_output(output: str) -> Place:
    """The folder for the findings: one that is not there yet, is empty, or holds findings that may be replaced; else a DataError."""
    folder = at(output)
    with telling(folder):
        held = {path.name for path in folder.iterdir() if not path.name.startswith(places.ASIDE)} if folder.is_dir() else set()
        taken = folder.is_file() or (held and "findings.json" not in held)
    if taken:
        raise DataError(f"{folder} already holds something else", "choose another --output")
    return folder


def numbers(summary: Summary) -> dict[str, Any]:
    """What was counted, as plain values."""
    quantiles = {"median": 0.5, "q95": 0.95, "q99": 0.99}
    lengths = {
        name: {q: length_quantile(histogram, share) for q, share in quantiles.items()} for name, histogram in _histograms(summary).items()
    }
    return {
        "examples": summary.examples,
        "prompts": summary.prompts,
        "answers": summary.answers,
        "kinds": dict(summary.kinds),
        "answers_of_an_example": {str(k): n for k, n in sorted(summary.answers_of_example.items())},
        "judgements_behind_a_target": {str(k): n for k, n in sorted(summary.counts.items())},
        "comparisons": summary.comparisons,
        "ties": summary.ties,
        "scripts_of_prompts": dict(summary.prompt_scripts.most_common()),
        "scripts_of_answers": dict(summary.answer_scripts.most_common()),
        "lengths": lengths,
        "targets": {f"{t:g}": n for t, n in sorted(summary.targets.most_common(50))},
    }


def _histograms(summary: Summary) -> dict[str, np.ndarray]:
    found = {"prompt, characters": summary.prompt_characters, "answer, characters": summary.answer_characters}
    return found | ({"prompt and longest answer, tokens": summary.tokens} if summary.tokens.any() else {})


# ---------------------------------------------------------------------------------------------------------------- a screen


def screen(findings: Sequence[Finding], summary: Summary, where: str) -> list[str]:
    """At most LINES lines: what was found by severity, what is clean, where the rest lies."""
    found = [f for f in findings if f.count]
    clean = [f.name for f in findings if not f.count]
    counts = Counter(f.severity for f in found)
    head = f"{summary.examples:,} examples of {summary.prompts:,} prompts: " + ", ".join(
        f"{counts[s]} {s}{'' if counts[s] == 1 else 's'}" for s in SEVERITIES
    )
    tail = _wrapped("not found: " + ", ".join(clean), 118)[:4] if clean else []
    tail.append(where)
    room = LINES - len(tail) - 3
    lines = [head, ""]
    width = min(44, max([len(f.name) for f in found[:room]], default=0))
    for finding in found[:room]:
        name = finding.name if len(finding.name) <= width else finding.name[:11] + "..." + finding.name[14 - width :]
        low = f" [{finding.numbers['low']:.3f}, {finding.numbers['high']:.3f}]" if "low" in finding.numbers else ""
        share = f"{finding.share:7.1%}" if not low else f"{finding.share:7.3f}"
        lines.append(f"{finding.severity:<8} {name:<{width}} {finding.count:>11,} {share}{low} of {finding.of:,} {finding.unit}")
    if len(found) > room:
        lines[-1] = f"... and {len(found) - room + 1} more"
    return [*lines, *tail]


def _wrapped(text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split(" "):
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


# ------------------------------------------------------------------------------------------------------------------- files


def write(folder: Place, source: str, findings: Sequence[Finding], summary: Summary, settings: Mapping[str, Any]) -> None:
    """findings.json with everything, all affected ids, and index.html; each appears whole, and replaces an older one."""
    whole = {"source": source, "settings": settings, "numbers": numbers(summary), "findings": [f.as_dict() for f in findings]}
    with telling(folder):
        places.write(folder / "findings.json", json.dumps(_no_nan(whole), indent=1, ensure_ascii=False) + "\n")
        places.write(folder / "index.html", to_html(source, findings, summary))


def _no_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _no_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_no_nan(v) for v in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def to_html(source: str, findings: Sequence[Finding], summary: Summary) -> str:
    """The findings as one page."""
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((Path(__file__).parent / "page.html.jinja").read_text(encoding="utf-8"))
    return template.render(source=source, findings=findings, plots=plots(findings, summary), n=numbers(summary))


# ------------------------------------------------------------------------------------------------------------------- plots


def _svg(draw: Callable[[Any], None]) -> str:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    looks = {"svg.fonttype": "none", "svg.hashsalt": "rayward", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(looks):
        figure = Figure(figsize=(4.2, 3.0), layout="constrained")
        draw(figure.subplots())
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()[out.getvalue().index("<svg") :]


def plots(findings: Sequence[Finding], summary: Summary) -> dict[str, str]:
    """Title -> SVG."""
    drawn = {"Lengths": _svg(lambda ax: _draw_lengths(ax, _histograms(summary)))}
    if summary.comparisons:
        biases = {f.name: f.numbers for f in findings if "low" in f.numbers}
        drawn["Biases of the better side"] = _svg(lambda ax: _draw_biases(ax, biases))
    drawn["Targets"] = _svg(lambda ax: _draw_targets(ax, summary.targets))
    drawn["Answers of an example"] = _svg(lambda ax: _draw_counter(ax, summary.answers_of_example, "answers", "examples"))
    drawn["Scripts"] = _svg(lambda ax: _draw_scripts(ax, summary))
    return drawn


def _draw_lengths(ax: Any, histograms: Mapping[str, np.ndarray]) -> None:
    for (name, histogram), color in zip(histograms.items(), (GREY, BLUE, ORANGE), strict=False):
        last = max(8, int(np.flatnonzero(histogram).max(initial=0)) + 2)
        edges = np.maximum(0.8, [bin_edge(b) for b in range(min(last, LENGTHS) + 1)])
        ax.stairs(histogram[: len(edges) - 1] / max(1, histogram.sum()), edges, color=color, label=name)
    ax.set(xscale="log", xlabel="length", ylabel="share of texts")
    ax.legend(frameon=False, fontsize=7)


def _draw_biases(ax: Any, biases: Mapping[str, Mapping[str, Any]]) -> None:
    names = {"length_bias": "longer", "position_bias": "shown first", "listed_first": "listed first"}
    for y, found in enumerate(biases.values()):
        ax.plot([found["low"], found["high"]], [y, y], color=BLUE, lw=2)
        ax.plot(found["share"], y, "o", color=BLUE)
    ax.axvline(0.5, color=GREY, lw=1, ls="--")
    ax.set(xlim=(0, 1.02), ylim=(-0.6, len(biases) - 0.4), xlabel="share of strict comparisons, 95 % interval")
    ax.set_yticks(range(len(biases)), [names[name] for name in biases])


def _draw_targets(ax: Any, targets: Counter[float]) -> None:
    values = np.array(sorted(targets))
    counts = np.array([targets[v] for v in values.tolist()])
    if len(values) <= 6:
        bars = ax.bar([f"{v:g}" for v in values], counts, color=BLUE, width=0.6)
        ax.bar_label(bars, [f"{c:,}" for c in counts], fontsize=7)
    else:
        ax.hist(values, bins=40, weights=counts, color=BLUE)
    ax.set(xlabel="target", ylabel="count")


def _draw_counter(ax: Any, counter: Counter[int], xlabel: str, ylabel: str) -> None:
    keys = sorted(counter)
    ax.bar(keys, [counter[k] for k in keys], color=BLUE)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.locator_params(axis="x", integer=True)


def _draw_scripts(ax: Any, summary: Summary) -> None:
    names = [name for name, _ in (summary.prompt_scripts + summary.answer_scripts).most_common(8)]
    place = np.arange(len(names))
    for shift, counter, color, label in ((-0.2, summary.prompt_scripts, GREY, "prompts"), (0.2, summary.answer_scripts, BLUE, "answers")):
        ax.barh(place + shift, [counter[n] / max(1, counter.total()) for n in names], 0.38, color=color, label=label)
    ax.set_yticks(place, names)
    ax.invert_yaxis()
    ax.set(xlabel="share")
    ax.legend(frameon=False)
