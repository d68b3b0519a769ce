"""Will the course run on this machine, and how fast? `python -m shared.doctor` says it. In reading order:

- `findings`: what a check returns, and how it is printed.
- `software`: Python, its environment, packages, torch.
- `machine`: processor, threads, graphics card, memory, disk.
- `files`: Jupyter's kernel, the data of the course, published models, GPT-2's tokenizer.
- `network`: do the package index and the model hub answer?
- `examination`: all checks, in groups.
- `speed`: what the machine does in a second, and what follows for notebooks and larger jobs.
- `__main__`: the command.

Each check is a function whose arguments say what it looks at, by default this machine, so that a test or a lesson can
give it another one. The room works where nothing else does: it needs only the standard library, takes everything else
inside the function that wants it, and an old Python gets as far as being told that it is old.
"""

from shared.doctor.examination import examine
from shared.doctor.findings import Finding, report
from shared.doctor.speed import Speed, judge, measure_speed

__all__ = ["Finding", "Speed", "examine", "judge", "measure_speed", "report"]
