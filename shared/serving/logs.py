"""A line of JSON for everything that happens, on standard error. No line holds what was asked or answered.

A log is kept for long and read by many; a prompt in it is a copy nobody decided on. What is logged of a request: its
id, where it went, how it ended, how long it took and how many tokens. Of an error its kind and place are logged, not
its message, which may repeat a value.

With `log_texts` of the server prompts and replies are written too: "full", or "redacted", without what
`shared.safety.privacy` finds. It knows no names, and no rule finds everything: such a log holds less personal data, but
it holds some.
"""

import json
import logging
import sys
import time
import traceback
from typing import Any

from shared.safety.privacy import redact

LOGGER = logging.getLogger("llm.serve")
LOG_TEXTS = ("none", "redacted", "full")  # what of prompts and replies is written


def shown_texts(value: object, how: str) -> object:
    """Return what of a prompt or a reply may stand in the log: None, the value, or a copy without personal data.

    Ids of tokens are text to whoever has the tokenizer: of them only their number is left in a redacted copy.
    """
    if how == "none":
        return None
    if how == "full":
        return value
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {name: shown_texts(part, how) for name, part in value.items()}
    if isinstance(value, list | tuple):
        if value and all(isinstance(part, int) for part in value):
            return f"{len(value)} tokens"
        return [shown_texts(part, how) for part in value]
    return value


class JsonLines(logging.Formatter):
    """Writes a record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        line |= getattr(record, "fields", {})
        if record.exc_info and record.exc_info[0] is not None:
            line["error"] = record.exc_info[0].__name__
            line["traceback"] = "".join(traceback.format_tb(record.exc_info[2]))
        return json.dumps(line, ensure_ascii=False, default=str)


def log(event: str, level: int = logging.INFO, *, exc_info: bool = False, **fields: object) -> None:
    """Write one line; fields of None are left out."""
    if LOGGER.isEnabledFor(level):
        kept = {name: value for name, value in fields.items() if value is not None}
        LOGGER.log(level, event, extra={"fields": kept}, exc_info=exc_info)


def set_up(level: str = "info") -> None:
    """Send our lines, and the warnings of uvicorn, to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name, lowest in (("llm.serve", level.upper()), ("uvicorn.error", "WARNING")):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(lowest)
