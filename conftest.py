"""How nbval runs and compares the notebooks, with `make test` and with plain `pytest --nbval FILE` alike.

Kernels get the environment of a checked run (`tests/tools/checked_run.py`), and their sums are in another order than
those of the stored outputs (`tests/tools/other_processor.py`). `tests/tools/notebook_outputs.py` says what may differ.
Cells that need a model package which is not installed are skipped, with those that depend on them (`needs.py`).
"""

from collections import Counter

import pytest
from nbval.plugin import IPyNbCell, IPyNbFile

from shared.notebook.results import MIME_TYPE
from tests.tools import checked_run
from tests.tools.needs import missing_tags, report, unavailable
from tests.tools.notebook_outputs import TolerantText


def pytest_configure(config) -> None:
    checked_run.apply()
    try:
        checked_run.seed_of_sums()
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    if not config.option.nbval_kernel_name:
        config.option.nbval_current_env = True  # the kernel of this Python, not another one named python3
    setup, collect, sanitize = IPyNbFile.setup, IPyNbFile.collect, IPyNbCell.sanitize

    def setup_in_another_order(self):
        setup(self)
        checked_run.reorder_sums(self.kernel)

    def collect_ignoring_more(self):
        # A recorded result is also in the output as text, a drawing as its description: those are compared.
        self.skip_compare = (*self.skip_compare, "stderr", MIME_TYPE, "image/svg+xml")
        items = list(collect(self))
        code_cells = [place for place, cell in enumerate(self.nb.cells) if cell.cell_type == "code"]
        for place, tag in unavailable(self.nb.cells, list(missing_tags())).items():
            items[code_cells.index(place)].add_marker(pytest.mark.skip(reason=tag))
        return items

    def sanitize_tolerantly(self, value):
        value = sanitize(self, value)
        return TolerantText(value) if isinstance(value, str) else value

    IPyNbFile.setup = setup_in_another_order
    IPyNbFile.collect = collect_ignoring_more
    IPyNbCell.sanitize = sanitize_tolerantly


def pytest_terminal_summary(terminalreporter) -> None:
    reasons = [str(skipped.longrepr[2]) for skipped in terminalreporter.stats.get("skipped", [])]
    missing = missing_tags()
    counts = Counter(tag for tag in missing for reason in reasons if reason.endswith(tag))
    for line in report(counts, missing):
        terminalreporter.write_line(line)
