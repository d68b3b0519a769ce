"""What a model may do to people, measured and held in check. In reading order:

- `spelling`: look-alike characters, spaced and doubled letters back to plain words.
- `filters`: texts that a service should not take or give: word list, patterns, classifier, and a guard for streams.
"""

from shared.safety.filters import ContentFilter, OutputGuard, load_filter
from shared.safety.spelling import Speller

__all__ = ["ContentFilter", "OutputGuard", "Speller", "load_filter"]
