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


BLANK = ("", "", "")
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
    @property
    def cost(self) -> str: ...


def write(rows: Sequence[Row], variants: Sequence[Variant], docs: Path) -> None:
    """Write recovery.md, below MARK, and a picture for each pair of model and criterion into `docs`."""
    references = {row["reference"]: row["perplexity"] for row in rows if "reference" in row}
    costs = {(row["model"], row["criterion"]): row["cost"] for row in rows if "cost" in row}
    runs = [row for row in rows if "method" in row]
    page = docs / "recovery.md"
    above = page.read_text().split(MARK)[0] if page.exists() else "# What each method wins back\n\n"
    lines = [above + MARK, ""]
    methods = [variant for variant in variants if variant.group == "methods"]
    for model, criterion in dict.fromkeys((row["model"], row["criterion"]) for row in runs):
        found = [row for row in runs if (row["model"], row["criterion"]) == (model, criterion)]
        patterns = list(dict.fromkeys(row["pattern"] for row in found))
        cost = costs.get((model, criterion), {})
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
        lines += _markdown(["", *patterns, "trained", "ms", "MiB"])
        lines += [_line(["not pruned", *[f"{references[model]:.2f}" for _ in patterns], *BLANK])]
        pruned = [f"{references[f'{model} {criterion} {each}']:.2f}" for each in patterns]
        lines += [_line(["pruned", *pruned, *BLANK])]
        for variant in methods:
            cells = [_spread(table[pattern].get(variant.name, [])) for pattern in patterns]
            if any(cells):
                trained = next(row["parameters"] for row in found if row["what"] == variant.what)
                lines += [_line([variant.name, *cells, f"{trained:,}", *_cost(cost, variant)])]
        lines.append("")
        for group, title in TITLES.items():
            lines += _ablation(
                found, [each for each in variants if each.group == group], title, cost, methods
            )
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


def _ablation(
    rows: Sequence[Row], variants: Sequence[Variant], title: str, cost: Row, methods: Sequence[Variant]
) -> list[str]:
    lines: list[str] = []
    told = {variant.what for variant in methods}
    for pattern in dict.fromkeys(row["pattern"] for row in rows):
        found = {v: best for v in variants if (best := _best(rows, pattern, v.what))}
        if {variant.what for variant in found} <= told:
            continue
        head = ["", "perplexity", "rate", "trained", "ms", "MiB", "loss: first tenth", "half way", "last"]
        lines += [f"### {title}, {pattern}", "", *_markdown(head)]
        for variant, best in found.items():
            curves = [row["losses"] for row in best]
            losses = (mean(curve[at(len(curve))] for curve in curves) for at in MOMENTS)
            cells = [_spread([row["perplexity"] for row in best]), f"{best[0]['lr']:.3g}"]
            cells += [f"{best[0]['parameters']:,}", *_cost(cost, variant)]
            lines.append(_line([variant.name, *cells, *(f"{loss:.3f}" for loss in losses)]))
        lines.append("")
    return lines


def _cost(costs: Row, variant: Variant) -> list[str]:
    cost = costs.get(variant.cost)
    return [f"{cost['ms']:.0f}", f"{cost['mib']:.0f}"] if cost else ["", ""]


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{mean(values):.2f}" + (f" ({min(values):.2f}-{max(values):.2f})" if len(values) > 1 else "")


def _markdown(head: Sequence[str]) -> list[str]:
    return [_line(head), _line(["---", *["---:"] * (len(head) - 1)])]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


PANEL, LABEL, LINE, MARGIN = 170, 120, 20, 24


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
