"""What a model may do to people, and give away of them, measured and held in check. In reading order:

- `spelling`: look-alike characters, spaced and doubled letters back to plain words.
- `filters`: texts that a service should not take or give: word list, patterns, classifier, and a guard for streams.
- `memorization`: what was learned by heart (canaries, exposure, membership), and training that bounds it (DP-SGD).
- `privacy`: personal data in a text, found and covered.
- `privacy_scores`: how well it is found, counted against labels.

Names of `memorization` are imported from there: it needs the training, and whoever filters or redacts does not.
"""

from shared.safety.filters import OutputGuard, adapter_scorer, load_filter
from shared.safety.privacy import find_personal_data, redact

__all__ = ["OutputGuard", "adapter_scorer", "find_personal_data", "load_filter", "redact"]
