"""Optimizers: Muon for the matrices of a Transformer, Lion, and one function that gives every parameter its
optimizer.

SGD, Adam and AdamW are torch's own. Muon follows Jordan et al. (2024, "Muon: An optimizer for hidden
layers in neural networks"), Lion follows Chen et al. (2023, "Symbolic Discovery of Optimization
Algorithms").

Left out: spreading Muon's work over ranks (with sharded parameters every rank orthogonalises every
matrix), closures, sparse gradients.

Explained and proven in ch05_pretraining/03_schedules_and_optimizers.ipynb; written from there by `make
promote`.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from shared.model.attention import MultiHeadAttention

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # steep at 0, so that small singular values grow fast


def orthogonalize(matrices: Tensor, n_steps: int = 5) -> Tensor:
    """Replace the singular values of each matrix by numbers near 1 and keep its singular vectors.

    A Newton-Schulz iteration of degree five (Jordan et al., 2024) after division by the Frobenius norm: five steps
    bring every singular value that is not tiny to between about 0.7 and 1.2. A zero matrix stays zero.

    Args:
        matrices: (..., rows, columns), all treated at once.
        n_steps: Number of steps.

    Raises:
        ValueError: matrices has fewer than two dimensions, or n_steps is below 1.
    """
    if matrices.dim() < 2 or n_steps < 1:
        shape = tuple(matrices.shape)
        raise ValueError(
            f"matrices must be (..., rows, columns) and n_steps at least 1, got {shape} and {n_steps}"
        )
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices  # the smaller Gram matrix
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(n_steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(Optimizer):
    """Momentum whose every update is orthogonalised (Jordan et al., 2024), for matrices inside a network.

    Matrices of equal shape are orthogonalised together. An update is multiplied by max(1, rows / columns) ** 0.5, so
    that its effect on the layer's output has the same size whatever the shape. Weight decay is decoupled. Parameters
    sharded by FSDP2 (DTensor) are gathered for the orthogonalisation, and each rank keeps its own shard of the result.

    Args:
        params: Matrices (..., rows, columns), or groups of them. A group may have "split": sizes that cut the rows into
            parts with an update each, as queries, keys and values in one matrix.
        lr: Learning rate: about the change of each matrix in spectral norm per step.
        momentum, nesterov: Share of the old average kept at a step; whether the update looks one step ahead.
        weight_decay: A step multiplies the weights by 1 - lr * weight_decay.
        n_steps: Newton-Schulz steps.
        dtype: Type in which they are computed; the parameter's own if not given. bfloat16 is enough, and fast on GPUs.

    Raises:
        ValueError: A number is out of range, a parameter is no matrix, or a split does not add up to its rows.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, object]],
        lr: float = 0.02,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        n_steps: int = 5,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_options(lr=lr, weight_decay=weight_decay, betas=(momentum,))
        self.dtype = dtype
        defaults = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "n_steps": n_steps, "split": None})
        for group in self.param_groups:
            for parameter in group["params"]:
                rows = parameter.shape[-2] if parameter.dim() > 1 else 0
                if not rows or sum(group["split"] or (rows,)) != rows:
                    shape = tuple(parameter.shape)
                    raise ValueError(
                        f"params must be matrices with rows as in {group['split']=}, got {shape}"
                    )

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient."""
        work: list[tuple[Tensor, dict[str, object], int]] = []  # parameter, its group, number of its parts
        parts: list[Tensor] = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                update = self._average(parameter, group)
                split = update.split(group["split"] or update.shape[-2], dim=-2)
                work.append((parameter, group, len(split)))
                parts += split
        done = iter(self._orthogonalized(parts, [group for _, group, n in work for _ in range(n)]))
        for parameter, group, n_parts in work:
            update = torch.cat([next(done) for _ in range(n_parts)], dim=-2).to(parameter.dtype)
            if isinstance(parameter, DTensor):  # without communication: every rank has the whole matrix
                mesh, placements = parameter.device_mesh, parameter.placements
                update = distribute_tensor(update, mesh, placements, src_data_rank=None)
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(update, alpha=-group["lr"])

    def _average(self, parameter: Tensor, group: dict[str, object]) -> Tensor:
        """Take the gradient into the running average and return what is to be orthogonalised, as a whole matrix."""
        state, gradient = self.state[parameter], parameter.grad
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        average = state["momentum"].lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(average, group["momentum"]) if group["nesterov"] else average
        return update.full_tensor() if isinstance(update, DTensor) else update

    def _orthogonalized(self, parts: list[Tensor], groups: list[dict[str, object]]) -> list[Tensor]:
        """Return the scaled updates of `parts`; those of equal shape are computed in one batch."""
        batches: dict[tuple, list[int]] = defaultdict(list)
        for i, (part, group) in enumerate(zip(parts, groups, strict=True)):
            batches[part.shape, part.dtype, part.device, group["n_steps"]].append(i)
        done: list[Tensor] = [None] * len(parts)
        for (shape, dtype, _, n_steps), indices in batches.items():
            batch = torch.stack([parts[i] for i in indices]).to(self.dtype or dtype)
            scale = max(1.0, shape[-2] / shape[-1]) ** 0.5
            for i, update in zip(indices, scale * orthogonalize(batch, n_steps), strict=True):
                done[i] = update
        return done


class Lion(Optimizer):
    """Steps of equal size for every number, in the direction of the sign of an average (Chen et al., 2023).

    Args:
        params: Parameters, or groups of them.
        lr: Learning rate; a third to a tenth of AdamW's is usual.
        betas: Share of the average in the direction of a step, and share of it that is kept afterwards.
        weight_decay: A step multiplies the weights by 1 - lr * weight_decay.

    Raises:
        ValueError: A number is out of range.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, object]],
        lr: float = 1e-4,
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        check_options(lr=lr, weight_decay=weight_decay, betas=betas)
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["average"] = torch.zeros_like(parameter)
                direction = state["average"].lerp(parameter.grad, 1 - beta1).sign_()
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(direction, alpha=-group["lr"])
                state["average"].lerp_(parameter.grad, 1 - beta2)


def check_options(*, lr: float, weight_decay: float, betas: Sequence[float]) -> None:
    """Refuse what no optimizer can work with; ValueError names the argument."""
    for name, value, holds, allowed in (
        ("lr", lr, 0 <= lr < math.inf, "at least 0"),
        ("weight_decay", weight_decay, 0 <= weight_decay < math.inf, "at least 0"),
        ("betas", betas, all(0 <= beta < 1 for beta in betas), "in [0, 1)"),
    ):
        if not holds:
            raise ValueError(f"{name} must be {allowed}, got {value}")


def build_optimizers(
    model: nn.Module,
    name: str,
    learning_rate: float,
    *,
    weight_decay: float = 0.01,
    matrix_learning_rate: float = 0.02,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
) -> list[Optimizer]:
    """Return optimizers that together update every trained parameter of `model`, each exactly once.

    Weight decay acts on matrices only: norms and biases have none. "muon" is Muon for the matrices inside `blocks`,
    queries, keys and values each on their own, and AdamW for the embeddings, the head and all vectors.

    Args:
        model: For "muon" its blocks must be named `blocks`, as in `GPTModel`.
        name: "sgd" (momentum betas[0], Nesterov), "adam" (decay as part of the gradient), "adamw", "lion" or "muon".
        learning_rate: The peak, which schedules scale.
        weight_decay: Strength of the decay.
        matrix_learning_rate: Muon's own learning rate.
        betas, eps: As in AdamW; Lion takes betas, SGD the first.

    Raises:
        ValueError: A name or number is not allowed, or "muon" finds no matrix inside `blocks`.
    """
    # Refuse what cannot work.
    if name not in OPTIMIZERS:
        raise ValueError(f"name must be one of {', '.join(OPTIMIZERS)}, got {name!r}")
    for label, rate in (("learning_rate", learning_rate), ("matrix_learning_rate", matrix_learning_rate)):
        if not 0 < rate < math.inf:
            raise ValueError(f"{label} must be above 0, got {rate}")
    check_options(lr=learning_rate, weight_decay=weight_decay, betas=betas)

    # Muon takes the matrices inside the blocks; fused projections are cut into queries, keys and values.
    trained = {key: value for key, value in model.named_parameters() if value.requires_grad}
    optimizers: list[Optimizer] = []
    if name == "muon":
        inside = [key for key, value in trained.items() if value.dim() > 1 and "blocks" in key.split(".")]
        if not inside:
            raise ValueError("name 'muon' needs a model with matrices inside `blocks`")
        splits = qkv_splits(model)
        groups: dict[tuple[int, ...] | None, list[Tensor]] = defaultdict(list)
        for key in inside:
            parameter = trained.pop(key)
            groups[splits.get(parameter)].append(parameter)
        matrices = [{"params": parameters, "split": split} for split, parameters in groups.items()]
        optimizers.append(Muon(matrices, matrix_learning_rate, weight_decay=weight_decay))

    # What is left goes to the optimizer of that name, matrices with decay and vectors without.
    decayed = [value for value in trained.values() if value.dim() > 1]
    kept = [value for value in trained.values() if value.dim() <= 1]
    pairs = ((decayed, weight_decay), (kept, 0.0))
    groups_of_rest = [{"params": values, "weight_decay": decay} for values, decay in pairs if values]
    if groups_of_rest:
        optimizers.append(OPTIMIZERS[name](groups_of_rest, learning_rate, betas, eps))
    return optimizers


def qkv_splits(model: nn.Module) -> dict[Tensor, tuple[int, int, int]]:
    """Return for each fused projection matrix of `model` its rows of queries, keys and values."""
    found = {}
    for module in model.modules():
        if isinstance(module, MultiHeadAttention) and module.kv_dim is None:
            queries, keys = module.n_heads * module.head_dim, module.n_kv_heads * module.head_dim
            found[module.qkv.weight] = (queries, keys, keys)
    return found


def set_learning_rates(optimizers: Iterable[Optimizer], factor: float) -> None:
    """Set every learning rate to its peak times `factor`; the first call keeps the peak as the group's "initial_lr"."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor


def _adamw(groups: list[dict[str, object]], lr: float, betas: tuple[float, float], eps: float) -> Optimizer:
    return torch.optim.AdamW(groups, lr, betas, eps, fused=True)


# What updates everything but Muon's matrices.
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": lambda groups, lr, betas, eps: torch.optim.SGD(groups, lr, betas[0], nesterov=betas[0] > 0),
    "adam": lambda groups, lr, betas, eps: torch.optim.Adam(groups, lr, betas, eps, fused=True),
    "adamw": _adamw,
    "lion": lambda groups, lr, betas, eps: Lion(groups, lr, betas=betas),
    "muon": _adamw,
}
