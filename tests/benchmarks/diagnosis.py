"""What `diagnose` says of healthy runs and of faults that had no part in choosing its ranges.

    python -m tests.benchmarks.diagnosis

One line for each case and seed: what it should suspect first, what it does suspect, and its measurements. A healthy
run that is suspected of anything is a false alarm; a fault is named if the first check that has not passed names it.
"""

import torch

from tests.training.diagnosis_cases import FAULTS, HEALTHY, first_suspect


def main() -> None:
    """Print the table and the counts."""
    torch.set_num_threads(1)
    found = {"false alarms": 0, "healthy": 0, "named": 0, "noticed": 0, "faults": 0}
    for name, case in {**HEALTHY, **FAULTS}.items():
        for seed in (0, 1):
            checks = case.checks(seed)
            first = first_suspect(checks)
            if case.wanted is None:
                found["healthy"] += 1
                found["false alarms"] += first is not None
            else:
                found["faults"] += 1
                found["noticed"] += first is not None
                found["named"] += first == case.wanted
            mark = " " if first == case.wanted else "!"
            values = " ".join(f"{check.value:8.3g}" for check in checks)
            print(f"{mark} {name:34} {seed}  {values}  {first}", flush=True)
    print(", ".join(f"{name} {count}" for name, count in found.items()))


if __name__ == "__main__":
    main()
