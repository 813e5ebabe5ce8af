"""docs/models.md is true of a fixed third of the model types, and lists all of them."""

from importlib.metadata import version

import pytest

from tests import traces
from tests.coverage import runner, table
from tests.coverage.models import TASKS, types_of
from tests.coverage.probe import SIZES, probe

SLOW = ("wanda", "onnx", "cusparselt")
"""Columns that only `make coverage-table` tries, as it does other sizes: together they take longer than all others."""

PAGE = runner.PAGE.read_text()
CELLS = table.read(PAGE)
HELD = [each for each in runner.third() if CELLS.get(each, {}).get("trace") == "y"]


@pytest.fixture(autouse=True)
def _forgotten():
    """No other test needs these traces."""
    yield
    traces.forget()


@pytest.mark.slow
@pytest.mark.parametrize(("task", "model_type"), HELD)
def test_what_worked_for_a_type_does_so_now(task, model_type):
    row = probe(task, model_type, without=SLOW, sizes=SIZES[:1])
    said = CELLS[task, model_type]
    assert {name: why for name, why in row.failures.items() if said[name] == "y"} == {}


def test_the_page_lists_every_type_of_every_task():
    if f"transformers {version('transformers')}," not in PAGE:
        pytest.skip("the page is of another version of transformers")
    assert list(CELLS) == [(task, model_type) for task in TASKS for model_type in types_of(task)]


def test_a_page_is_read_as_it_was_written():
    rows = [runner.Row(*each, {**cells}) for each, cells in CELLS.items()]
    assert table.read(table.document(rows)) == CELLS
