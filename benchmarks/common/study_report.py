"""Tables and pictures of the study, written into docs/recovery.md."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import mean
from typing import Any, Protocol

Row = Mapping[str, Any]
TITLES = {
    "defaults": "The default of `spp-fx train` against the papers' settings",
    "start": "Starts of SPP",
    "start-lors": "Starts of LoRS",
    "form": "Forms of SPP",
    "rank": "Ranks of SPP",
}


MOMENTS = (lambda n: 0, lambda n: (n - 1) // 2, lambda n: n - 1)
MARK = "<!-- make study writes everything below this line -->"
"""What stands above it in recovery.md is written by hand."""


class Variant(Protocol):
    """See `study.Variant`."""

    @property
    def group(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def what(self) -> str: ...


def write(rows: Sequence[Row], variants: Sequence[Variant], docs: Path) -> None:
    """Write recovery.md, below MARK, and a picture for each pair of model and criterion into `docs`."""
    references = {row["reference"]: row["perplexity"] for row in rows if "reference" in row}
    runs = [row for row in rows if "reference" not in row]
    page = docs / "recovery.md"
    above = page.read_text().split(MARK)[0] if page.exists() else "# What each method wins back\n\n"
    lines = [above + MARK, ""]
    methods = [variant for variant in variants if variant.group == "methods"]
    for model, criterion in sorted({(row["model"], row["criterion"]) for row in runs}):
        found = [row for row in runs if (row["model"], row["criterion"]) == (model, criterion)]
        patterns = sorted({row["pattern"] for row in found})
        picture = docs / "pictures" / f"recovery-{model}-{criterion}.svg"
        table = {
            pattern: {
                variant.name: values
                for variant in methods
                if (values := perplexities(found, pattern, variant.what))
            }
            for pattern in patterns
        }
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.write_text(dots(table))
        lines += [f"## {model}, {criterion}", "", f"![perplexity by method](pictures/{picture.name})", ""]
        lines += _markdown(["", *patterns])
        lines += [_line(["not pruned", *[f"{references[model]:.2f}" for _ in patterns]])]
        lines += [
            _line(["pruned", *[f"{references[f'{model} {criterion} {each}']:.2f}" for each in patterns]])
        ]
        for variant in methods:
            cells = [_spread(table[pattern].get(variant.name, [])) for pattern in patterns]
            lines += [_line([variant.name, *cells])] if any(cells) else []
        lines += ["", *_costs(found, methods, patterns[0])]
        for group, title in TITLES.items():
            lines += _ablation(found, [each for each in variants if each.group == group], title)
    page.write_text("\n".join(lines).rstrip() + "\n")


def perplexities(rows: Iterable[Row], pattern: str, what: str) -> list[float]:
    """Of the seeds at the best rate of a variant."""
    return [row["perplexity"] for row in _best(rows, pattern, what)]


def _best(rows: Iterable[Row], pattern: str, what: str) -> list[Row]:
    by_rate: dict[float | None, list[Row]] = defaultdict(list)
    for row in rows:
        if (row["pattern"], row["what"]) == (pattern, what):
            by_rate[row["multiple"]].append(row)
    if not by_rate:
        return []
    first = {row["multiple"]: row["loss"] for found in by_rate.values() for row in found if row["seed"] == 0}
    return by_rate[min(first, key=first.__getitem__)] if first else []


def _ablation(rows: Sequence[Row], variants: Sequence[Variant], title: str) -> list[str]:
    lines: list[str] = []
    for pattern in sorted({row["pattern"] for row in rows}):
        named = {variant.name: _best(rows, pattern, variant.what) for variant in variants}
        if sum(bool(found) for found in named.values()) < 2:
            continue
        head = ["", "perplexity", "rate", "trained", "loss: first tenth", "half way", "last"]
        lines += [f"### {title}, {pattern}", "", *_markdown(head)]
        for name, found in named.items():
            if found:
                values, curves = [row["perplexity"] for row in found], [row["losses"] for row in found]
                losses = (mean(curve[at(len(curve))] for curve in curves) for at in MOMENTS)
                cells = [_spread(values), f"{found[0]['lr']:.3g}", f"{found[0]['parameters']:,}"]
                lines.append(_line([name, *cells, *(f"{loss:.3f}" for loss in losses)]))
        lines.append("")
    return lines


def _costs(rows: Sequence[Row], variants: Sequence[Variant], pattern: str) -> list[str]:
    lines = [
        f"Cost at {pattern}: CPU time of a step's forward and backward on one thread, and the memory that it takes",
        "beside the weights.",
        "",
        *_markdown(["", "trained", "rate", "ms", "MiB"]),
    ]
    for variant in variants:
        measured = [
            row
            for row in rows
            if (row["pattern"], row["what"]) == (pattern, variant.what) and "step_ms" in row
        ]
        if measured:
            (row, *_), (best, *_) = measured, _best(rows, pattern, variant.what)
            cells = [
                f"{row['parameters']:,}",
                f"{best['lr']:.3g}",
                f"{row['step_ms']:.0f}",
                f"{row['peak_mib']:.0f}",
            ]
            lines.append(_line([variant.name, *cells]))
    return [*lines, ""]


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{mean(values):.2f}" + (f" ({min(values):.2f}-{max(values):.2f})" if len(values) > 1 else "")


def _markdown(head: Sequence[str]) -> list[str]:
    return [_line(head), _line(["---", *["---:"] * (len(head) - 1)])]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


PANEL, LABEL, LINE, MARGIN = 170, 90, 20, 24


def dots(table: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """An SVG with a panel for each pattern: for each method a dot at its mean, a line over its values."""
    names = list(dict.fromkeys(name for panel in table.values() for name in panel))
    width, height = LABEL + len(table) * PANEL, 2 * MARGIN + LINE * len(names)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for row, name in enumerate(names):
        parts.append(f'<text x="4" y="{MARGIN + LINE * row + 14}">{escape(name)}</text>')
    for column, (title, panel) in enumerate(table.items()):
        left, room = LABEL + column * PANEL, PANEL - 30
        every = [value for values in panel.values() for value in values]
        low, high = min(every, default=0.0), max(every, default=1.0)

        def at(value: float, left: int = left, low: float = low, high: float = high, room: int = room) -> str:
            return f"{left + 10 + room * (value - low) / ((high - low) or 1):.1f}"

        parts.append(f'<text x="{left + 10}" y="14" font-weight="bold">{escape(title)}</text>')
        for row, name in enumerate(names):
            y = MARGIN + LINE * row + 10
            parts.append(f'<line x1="{left + 10}" x2="{left + 10 + room}" y1="{y}" y2="{y}" stroke="#ddd"/>')
            if values := panel.get(name):
                ends = f'x1="{at(min(values))}" x2="{at(max(values))}"'
                parts.append(
                    f'<line {ends} y1="{y}" y2="{y}" stroke="#246" stroke-width="3"/>'
                    f'<circle cx="{at(mean(values))}" cy="{y}" r="4" fill="#246"/>'
                )
        for value, anchor in ((low, "start"), (high, "end")):
            parts.append(
                f'<text x="{at(value)}" y="{height - 8}" text-anchor="{anchor}" fill="#666">{value:.1f}</text>'
            )
    return "\n".join([*parts, "</svg>"]) + "\n"
