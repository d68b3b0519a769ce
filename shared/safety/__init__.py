"""What a model must not say and must not give away. In reading order:

- `memorization`: what was learned by heart (canaries, exposure, membership), and training that bounds it (DP-SGD).
- `privacy`: personal data in a text, found and covered.
- `privacy_scores`: how well it is found, counted against labels.
"""

from shared.safety.memorization import canary_exposures, membership, privacy_spent, train_privately
from shared.safety.privacy import find_personal_data, redact

__all__ = [
    "canary_exposures",
    "find_personal_data",
    "membership",
    "privacy_spent",
    "redact",
    "train_privately",
]
