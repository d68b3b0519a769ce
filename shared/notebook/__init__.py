"""What notebooks and the scripts beside them use to draw, to show and to keep what they measure. In reading order:

- `plotting`: one style for all figures, and the few kinds that recur.
- `lettering`: how wide a text is in a drawing, and which colours can be read.
- `drawing`: pictures of ideas: vectors, matrices, arrows, tokens, layers.
- `proof`: ours beside a trusted implementation, in one line.
- `results`: main figures, recorded for the table of `make run`.
- `records`: CSV files that grow row by row.
- `ngrams`: language models that only count, the baseline of learned ones.
- `runners`: small models of earlier eras, for the race of chapter 1.
- `tale_runs`: the training run on tales that sweeps repeat.
- `chat_panel`: a panel to talk to a model in JupyterLab.
- `practice_server`: a chat server on this machine, to try a client on.
"""

from shared.notebook.plotting import heat_map, label_line, use_style
from shared.notebook.proof import compare
from shared.notebook.records import replace_rows
from shared.notebook.results import record

__all__ = ["compare", "heat_map", "label_line", "record", "replace_rows", "use_style"]
