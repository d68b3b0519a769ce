"""How long a function takes, on a machine that does other things too."""

import time
from collections.abc import Callable


def seconds(function: Callable[[], object], n_times: int = 3) -> float:
    """Return the processor time of a call: the least of several, since other work on the machine only adds."""
    found = []
    for _ in range(n_times):
        started = time.process_time()
        function()
        found.append(time.process_time() - started)
    return min(found)
