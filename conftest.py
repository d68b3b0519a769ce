"""How nbval compares a notebook's stored outputs with new ones: `tests/notebook_outputs.py` says what may differ."""

from nbval.plugin import IPyNbCell, IPyNbFile

from shared.results import MIME_TYPE
from tests.notebook_outputs import TolerantText


def pytest_configure() -> None:
    collect, sanitize = IPyNbFile.collect, IPyNbCell.sanitize

    def collect_ignoring_more(self):
        # A recorded result is also in the output as text, which is compared.
        self.skip_compare = (*self.skip_compare, "stderr", MIME_TYPE)
        return collect(self)

    def sanitize_tolerantly(self, value):
        value = sanitize(self, value)
        return TolerantText(value) if isinstance(value, str) else value

    IPyNbFile.collect = collect_ignoring_more
    IPyNbCell.sanitize = sanitize_tolerantly
