"""Makes torch add in another order, as another maker's processor would.

Kernels written for another processor split sums elsewhere. Here each matrix product on the CPU is cut along its inner
dimension at a place that a seed gives, and the second part is added first: views, no copies of the operands. What is
exact stays exact (a one-hot row still picks its row); most other results differ in their last bits, which a training
run enlarges step by step. What a notebook prints or a test asserts should survive that.

`checked_run.py` installs it in every kernel that nbval starts and in the process of the tests; OTHER_PROCESSOR holds
the seed (default 1, 0 switches it off).

Leaves out: convolutions, fused attention, norms and softmax, quantised kernels, compiled graphs, calls with `out=`,
other libraries and devices. Surviving it is necessary, not sufficient.
"""

import warnings

import torch
from torch import Tensor

_installed: list[tuple[int, torch.library.Library]] = []  # a library that is dropped takes its kernels along


def cut(size: int, seed: int) -> int:
    """Return where a sum of `size` terms is cut: between a quarter and three quarters of it."""
    return max(1, size * (25 + (seed * 7919 + size * 104_729) % 50) // 100)


def install(seed: int) -> None:
    """Replace torch's matrix products on the CPU, for this process and until its end; 0 changes nothing.

    Raises:
        RuntimeError: Another seed is installed already.
    """
    if _installed and _installed[0][0] != seed:
        raise RuntimeError(f"sums are already in the order of seed {_installed[0][0]}, asked for {seed}")
    if _installed or not seed:
        return
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that a kernel is replaced, which is the purpose
        for name, kernel in _kernels(seed).items():
            library.impl(name, kernel, "CPU")
    _installed.append((seed, library))


def _kernels(seed: int) -> dict:
    """Return the replacements by operator. Variants with `out=` are torch's own: the parts are computed by them."""
    ops = torch.ops.aten

    def mm(a: Tensor, b: Tensor) -> Tensor:  # (rows, size), (size, columns)
        out = a.new_empty((a.shape[0], b.shape[1]))
        if (size := a.shape[1]) < 3:  # two terms have one sum
            return ops.mm.out(a, b, out=out)
        k = cut(size, seed)
        ops.mm.out(a[:, k:], b[k:], out=out)
        return ops.addmm.out(out, a[:, :k], b[:k], out=out)

    def bmm(a: Tensor, b: Tensor) -> Tensor:  # (batch, rows, size), (batch, size, columns)
        out = a.new_empty((a.shape[0], a.shape[1], b.shape[2]))
        if (size := a.shape[2]) < 3:
            return ops.bmm.out(a, b, out=out)
        k = cut(size, seed)
        ops.bmm.out(a[..., k:], b[:, k:], out=out)
        return ops.baddbmm.out(out, a[..., :k], b[:, :k], out=out)

    def mv(a: Tensor, x: Tensor) -> Tensor:  # (rows, size), (size,)
        out = a.new_empty((a.shape[0],))
        if (size := a.shape[1]) < 3:
            return ops.mv.out(a, x, out=out)
        k = cut(size, seed)
        ops.mv.out(a[:, k:], x[k:], out=out)
        return ops.addmv.out(out, a[:, :k], x[:k], out=out)

    def plus(product):
        """Return the operator that adds a product to its first argument, as a layer adds its bias."""

        def operator(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
            out = product(a, b)
            out = out if alpha == 1 else out.mul_(alpha)
            return out.add_(c, alpha=beta) if beta else out

        return operator

    return {
        "mm": mm,
        "bmm": bmm,
        "mv": mv,
        "addmm": plus(mm),
        "baddbmm": plus(bmm),
        "addmv": plus(mv),
    }
