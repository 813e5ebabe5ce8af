"""docs/models.md: the rows of all types as tables of Markdown."""

from collections.abc import Sequence
from importlib.metadata import version

from tests.coverage.probe import COLUMNS, EXACT, ROUNDED, Row

HEAD = """# Models

What spp-fx does with each model type that transformers registers for a task. Of every type a small random model is
made from its configuration class (float32, a few layers in which all kinds of its layers occur) and taken through all
verbs. `make coverage-table` writes this page; transformers {transformers}, torch {torch}.

| column | y means |
|---|---|
| trace | the program answers as the model does, {exact:g} relative, at three lengths and two batch sizes |
| match | every linear, Conv1D and expert stack of a layer is a site, or is left out for what the model does with it |
| wanda | `prune --method wanda --pattern 2:4`; where that fails, `--method magnitude` goes on |
| inject | `inject`, SPP of rank 4 |
| train | a step of AdamW changes the loss and every factor |
| fold | `merge --verify-sparsity`; masks and names are the base's, and every byte of the other tensors |
| verify | `verify --pattern 2:4` |
| load | `from_pretrained` of the merged folder answers as the program with the adapter, {rounded:g} relative |
| cusparselt | `export --format cusparselt --sm 90 --dtype float16`, read back |
| onnx | `export --format onnx-packed`, run in onnxruntime and compared |

`n`: it does not, see the reason. `-`: not tried, as an earlier step failed, or it does not apply. `lengths`: those that
one trace holds for; a model is traced again for others.
"""


def document(rows: Sequence[Row]) -> str:
    """The page, of rows in any order."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    parts = [
        HEAD.format(
            transformers=version("transformers"),
            torch=version("torch").partition("+")[0],
            exact=EXACT,
            rounded=ROUNDED,
        )
    ]
    parts.append("| task | types | end to end | without ONNX |\n|---|---|---|---|")
    for task in tasks:
        own = [row for row in rows if row.task == task]
        whole, most = sum(row.whole for row in own), sum(row.whole_but_onnx for row in own)
        parts[-1] += f"\n| [{task}](#{task}) | {len(own)} | {whole} | {most} |"
    for task in tasks:
        own = sorted((row for row in rows if row.task == task), key=lambda row: row.model_type)
        lines = [
            f"## {task}\n",
            f"| type | {' | '.join(COLUMNS)} | reason |",
            "|---" * (len(COLUMNS) + 2) + "|",
        ]
        lines += [_line(row) for row in own]
        parts.append("\n".join(lines))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _line(row: Row) -> str:
    shown = [
        row.cells[name] if name == "lengths" or row.cells[name] in ("y", "-") else "n" for name in COLUMNS
    ]
    text = "; ".join(f"{name}: {why}" for name, why in row.failures.items()).replace("|", "\\|")
    return f"| {row.model_type} | {' | '.join(shown)} | {text} |"


def read(text: str) -> dict[tuple[str, str], dict[str, str]]:
    """The cells of a page: by task and type, `y`, `n` or `-` by column."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    task = ""
    for line in text.splitlines():
        if line.startswith("## "):
            task = line.removeprefix("## ").strip()
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if task and line.startswith("| ") and cells[0] != "type":
            found[task, cells[0]] = dict(zip(COLUMNS, cells[1:], strict=False))
    return found
