"""Compare what a notebook built with a trusted implementation and print how far apart they may be."""

import numpy as np
import torch


def compare(label: str, ours: object, reference: object, tolerance: float = 1e-5) -> None:
    """Fail when two arrays differ by more than `tolerance` anywhere, else print that they agree within it.

    The difference itself is a rounding error, another one on each processor, so it is not printed.

    Args:
        label: What is compared, for the printed line.
        ours: A tensor, array, or nested sequence of numbers.
        reference: The same from the trusted implementation; its shape must be equal.
        tolerance: The largest absolute difference that passes.

    Raises:
        AssertionError: The shapes differ, a value is not finite, or the difference is too large.
    """
    ours, reference = _as_array(ours), _as_array(reference)
    if ours.shape != reference.shape:
        raise AssertionError(f"{label}: shape {ours.shape} is not the reference's {reference.shape}")
    difference = float(np.max(np.abs(ours - reference))) if ours.size else 0.0
    if not difference <= tolerance:
        raise AssertionError(
            f"{label}: maximum absolute difference {difference:.1e} is above {tolerance:.0e}"
        )
    print(f"{label}: equal within {tolerance:.0e}")


def _as_array(values: object) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=np.float64)
