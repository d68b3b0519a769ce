"""`shared.training.loop` against plain loops in torch, and what must hold of its log, for any loss."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shared.model.layers import balance_loss
from shared.training.batches import IGNORE, pad_rows
from shared.training.loop import train
from shared.training.losses import next_token_loss
from shared.training.optimizers import build_optimizers
from tests.training.small import build, random_batch


def adamw(model: nn.Module, lr: float = 1e-2) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=lr)


def test_steps_equal_a_plain_loop_in_torch():
    # In float64: a key's bias has no effect, so its gradient is rounding noise, which Adam would blow up.
    ours, plain = build().double(), build().double()
    batches = [random_batch(seed=seed) for seed in range(6)]
    log = train(ours, batches, adamw(ours), n_steps=6, max_grad_norm=0.5)
    optimizer = adamw(plain)
    losses, norms = [], []
    for inputs, targets in batches:
        loss = F.cross_entropy(plain(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(plain.parameters(), 0.5).item())
        optimizer.step()
        losses.append(loss.item())
    assert [record.loss for record in log[1:]] == pytest.approx(losses, abs=1e-9)
    assert [record.grad_norm for record in log[1:]] == pytest.approx(norms, abs=1e-9)
    for mine, other in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-8, rtol=1e-6)


def test_log_and_evaluations():
    model, seen = build(dropout=0.1), []

    def on_evaluate(step: int) -> float:
        seen.append((step, model.training))
        return float(step)

    log = train(model, [random_batch()], adamw(model), n_steps=5, evaluate_every=2, on_evaluate=on_evaluate)
    assert seen == [(0, False), (2, False), (4, False), (5, False)] and model.training
    assert [record.step for record in log] == list(range(6))
    assert [record.tokens for record in log] == [32 * step for step in range(6)]
    assert [record.validation_loss for record in log] == [0.0, None, 2.0, None, 4.0, 5.0]
    assert log[0].loss is None and log[0].grad_norm is None
    assert all(record.learning_rate == 1e-2 for record in log[1:])


def test_training_learns():
    model, batch = build(), random_batch()
    log = train(model.eval(), [batch], adamw(model), n_steps=60)
    assert not model.training
    assert log[1].loss > 2.5 > 0.5 > log[-1].loss


def test_accumulated_batches_equal_one_large_batch_whatever_their_sizes():
    rows = [[1, 2, 3, 4, 5, 6, 7], [8, 9], [3, 4, 5], [1, 2, 9, 9], [2, 2]]
    one, several = build().double(), build().double()
    train(one, [pad_rows(rows)], torch.optim.SGD(one.parameters(), lr=0.1), n_steps=3)
    parts = [pad_rows(rows[:1]), pad_rows(rows[1:4]), pad_rows(rows[4:])]
    train(several, parts, torch.optim.SGD(several.parameters(), lr=0.1), n_steps=3, accumulation=3)
    for a, b in zip(one.parameters(), several.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)


def test_several_optimizers_and_a_schedule():
    model = build()
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    optimizers = [torch.optim.SGD(matrices, lr=0.5), torch.optim.AdamW(others, lr=0.01)]
    before = copy.deepcopy(model.state_dict())
    log = train(model, [random_batch()], optimizers, n_steps=4, schedule=lambda k: 1 / (k + 1))
    assert [record.learning_rate for record in log[1:]] == pytest.approx([0.5, 0.25, 0.5 / 3, 0.125])
    assert [optimizer.param_groups[0]["lr"] for optimizer in optimizers] == [0.5, 0.01]
    # Both optimizers worked: every parameter moved.
    assert all(not torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_a_run_in_two_parts_equals_one_run():
    batches = [random_batch(seed=seed) for seed in range(8)]
    schedule = lambda k: 1 - k / 8
    whole, parts = build(), build()
    expected = train(whole, batches, adamw(whole), n_steps=8, schedule=schedule)
    optimizer = adamw(parts)
    train(parts, batches[:5], optimizer, n_steps=5, schedule=schedule)
    log = train(parts, batches[5:], optimizer, n_steps=8, start_step=5, schedule=schedule)
    assert [(r.step, r.loss, r.learning_rate) for r in log[1:]] == [
        (r.step, r.loss, r.learning_rate) for r in expected[6:]
    ]


def rates(optimizers) -> list[float]:
    return [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]


def test_a_schedule_leaves_the_learning_rates_as_they_were():
    model = build()
    optimizers = build_optimizers(model, "muon", 1e-2)
    before, options = rates(optimizers), {"n_steps": 4, "schedule": lambda k: 1 - k / 3}
    log = train(model, [random_batch()], optimizers, **options)
    assert log[-1].learning_rate == 0.0 and rates(optimizers) == before
    # The next run is at the rates that the groups have, those of the first run forgotten.
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = 0.5
    log = train(model, [random_batch()], optimizers, **options)
    assert [record.learning_rate for record in log[1:]] == pytest.approx([0.5, 1 / 3, 1 / 6, 0.0])
    assert set(rates(optimizers)) == {0.5}


def test_an_interrupted_run_gives_the_learning_rates_back():
    model = build()
    optimizer = adamw(model)

    def stop(record):
        if record.step == 2:
            raise KeyboardInterrupt

    options = {"n_steps": 4, "schedule": lambda k: 1 - k / 4}
    with pytest.raises(KeyboardInterrupt):
        train(model, [random_batch()], optimizer, on_step=stop, **options)
    assert rates([optimizer]) == [1e-2] and "initial_lr" not in optimizer.param_groups[0]


@pytest.mark.parametrize("lr", [1e-2, torch.tensor(1e-2)])
def test_a_run_goes_on_from_an_optimizer_state_that_was_saved_midway(lr):
    batches, options = [random_batch(seed=seed) for seed in range(6)], {"schedule": lambda k: 1 - k / 6}
    whole, saved = build(), {}
    optimizer = torch.optim.AdamW(whole.parameters(), lr=lr)

    def save(record):
        if record.step == 3:
            saved.update(copy.deepcopy({"model": whole.state_dict(), "optimizer": optimizer.state_dict()}))

    expected = train(whole, batches, optimizer, n_steps=6, on_step=save, **options)
    resumed = build(seed=1)
    resumed.load_state_dict(saved["model"])
    optimizer = torch.optim.AdamW(resumed.parameters(), lr=0.7)
    optimizer.load_state_dict(saved["optimizer"])
    log = train(resumed, batches[3:], optimizer, n_steps=6, start_step=3, **options)
    assert [(r.loss, r.learning_rate) for r in log[1:]] == [(r.loss, r.learning_rate) for r in expected[4:]]
    assert all(type(record.learning_rate) is float for record in log[1:])
    assert rates([optimizer]) == [lr] and "initial_lr" not in optimizer.param_groups[0]


def test_an_optimizer_of_another_model_is_refused():
    model, other = build(), build()
    with pytest.raises(
        ValueError, match=r"optimizers\[1\] must hold parameters of the model, got 16 of another"
    ):
        train(model, [random_batch()], [adamw(model), adamw(other)], n_steps=1)


# --- whose modes are whose


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("error", [None, "in a step", "in an evaluation"])
def test_every_module_has_its_own_mode_back_also_after_an_error(error):
    model, seen = build(n_layers=2, dropout=0.1), []
    model.blocks[0].eval()
    before = modes(model)

    def on_evaluate(step):
        seen.append(modes(model))
        model.train()  # as many evaluations end
        if error == "in an evaluation":
            raise RuntimeError(error)

    def on_step(record):
        seen.append(modes(model))
        if error == "in a step":
            raise RuntimeError(error)

    options = {"n_steps": 2, "on_evaluate": on_evaluate, "on_step": on_step}
    if error:
        with pytest.raises(RuntimeError, match=error):
            train(model, [random_batch()], adamw(model), **options)
    else:
        train(model, [random_batch()], adamw(model), **options)
        # Evaluated as a whole, and trained with each module in its own mode.
        all_off = [False] * len(before)
        assert seen == [all_off, before, all_off, before]
    assert modes(model) == before


def test_a_model_in_evaluation_mode_is_trained_in_training_mode():
    model, seen = build(dropout=0.1).eval(), []
    train(model, [random_batch()], adamw(model), n_steps=1, on_step=lambda _: seen.append(modes(model)))
    assert all(seen[0]) and not any(modes(model))


def test_clipping_bounds_the_step_and_none_does_not():
    moves = []
    for limit in (1e-3, None):
        model = build()
        before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        train(
            model,
            [random_batch()],
            torch.optim.SGD(model.parameters(), lr=1.0),
            n_steps=1,
            max_grad_norm=limit,
        )
        moves.append((nn.utils.parameters_to_vector(model.parameters()) - before).norm().item())
    assert moves[0] == pytest.approx(1e-3, rel=1e-2) and moves[1] > 0.1


def test_bfloat16_keeps_float32_weights_and_is_close():
    finals = []
    for dtype in (None, torch.bfloat16):
        model = build()
        finals.append(train(model, [random_batch()], adamw(model), n_steps=20, autocast=dtype)[-1].loss)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert finals[0] != finals[1] and finals[0] == pytest.approx(finals[1], abs=0.1)


def test_auxiliary_loss_trains_but_is_not_logged():
    options = {"feed_forward": "moe", "n_experts": 4, "n_active_experts": 1}
    plain, balanced = build(**options), build(**options)
    sgd = lambda model: torch.optim.SGD(model.parameters(), lr=0.1)
    first = train(plain, [random_batch()], sgd(plain), n_steps=1)
    log = train(balanced, [random_batch()], sgd(balanced), n_steps=1, auxiliary_loss=balance_loss)
    assert log[1].loss == first[1].loss
    routers = [model.blocks[0].feed_forward.router.weight for model in (plain, balanced)]
    assert not torch.equal(*routers)


def test_a_loss_that_is_not_finite_stops_before_the_update():
    model = build()
    with torch.no_grad():
        model.final_norm.weight[0] = math.nan
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FloatingPointError, match=r"step 1: loss nan, gradient norm nan"):
        train(model.eval(), [random_batch()], adamw(model), n_steps=1)
    assert not model.training
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], equal_nan=True, atol=0, rtol=0)


def test_an_exploding_run_stops():
    model = build()
    with pytest.raises(FloatingPointError, match=r"step \d+: loss"):
        train(
            model,
            [random_batch()],
            torch.optim.SGD(model.parameters(), lr=1e6),
            n_steps=50,
            max_grad_norm=None,
        )


def test_batches_that_end_or_hold_nothing():
    model = build()
    with pytest.raises(ValueError, match="batches ended before the last step"):
        train(model, iter([random_batch()]), adamw(model), n_steps=2)
    inputs, targets = random_batch()
    with pytest.raises(ValueError, match="batches of step 1 hold no target"):
        train(model, [(inputs, torch.full_like(targets, IGNORE))], adamw(model), n_steps=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_steps": 0}, "n_steps must be above start_step=0, got 0"),
        ({"start_step": -1}, "start_step must be at least 0, got -1"),
        ({"accumulation": 0}, "accumulation must be at least 1, got 0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be above 0, or None, got 0.0"),
        ({"evaluate_every": 0}, "evaluate_every must be at least 1, or None, got 0"),
        ({"autocast": torch.float16}, "autocast must be torch.bfloat16 or None, got torch.float16"),
    ],
)
def test_arguments_out_of_range(options, message):
    model = build()
    with pytest.raises(ValueError) as caught:
        train(model, [random_batch()], adamw(model), **{"n_steps": 1, **options})
    assert str(caught.value) == message
    with pytest.raises(ValueError, match="optimizers must be at least one"):
        train(model, [random_batch()], [], n_steps=1)


# --- other losses


class Classifier(nn.Module):
    """Two classes from the mean of some numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(numbers).tanh())


def class_losses(model: nn.Module, numbers: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(numbers), classes, reduction="none")


def labeled(n_batches: int, rows: int = 5) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    numbers = torch.randn(n_batches, rows, 6, generator=generator)
    return [(part, (part.sum(dim=1) > 0).long()) for part in numbers]


@pytest.mark.parametrize("summed", [False, True])
def test_a_classification_loss_equals_a_plain_loop_to_the_last_digit(summed):
    ours, plain, batches = Classifier(), Classifier(), labeled(8)
    loss = (lambda *arguments: class_losses(*arguments).sum()) if summed else class_losses
    log = train(ours, batches, adamw(ours), n_steps=8, loss=loss, schedule=lambda k: 1 - k / 8)
    optimizer, losses = adamw(plain), []
    for k, (numbers, classes) in enumerate(batches):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - k / 8)
        mean = F.cross_entropy(plain(numbers), classes, reduction="none").sum() / len(classes)
        optimizer.zero_grad()
        mean.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        losses.append(mean.item())
    assert [record.loss for record in log[1:]] == losses
    assert [record.tokens for record in log] == [5 * step for step in range(9)]
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))


def test_a_loss_of_one_s_own_accumulates_and_leaves_out_what_is_ignored():
    (numbers, classes), *_ = labeled(1, rows=6)
    classes[4:] = IGNORE
    one, several = Classifier().double(), Classifier().double()
    numbers = numbers.double()
    loss = lambda model, x, y: F.cross_entropy(model(x), y, ignore_index=IGNORE, reduction="sum")
    options = {"n_steps": 2, "loss": loss}
    train(one, [(numbers[:4], classes[:4])], torch.optim.SGD(one.parameters(), lr=0.1), **options)
    parts = [(numbers[:1], classes[:1]), (numbers[1:], classes[1:])]
    train(several, parts, torch.optim.SGD(several.parameters(), lr=0.1), accumulation=2, **options)
    for a, b in zip(one.parameters(), several.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)


def test_preferences_with_two_inputs_and_frozen_weights():
    # As in DPO: a pair of texts goes in, a number of the frozen reference is the target, and pairs are counted.
    model, batch = build(), random_batch()[0]
    for parameter in model.token_embedding.parameters():
        parameter.requires_grad_(False)
    frozen = model.token_embedding.weight.clone()

    def preference(model, inputs, reference):
        better, worse = (
            -next_token_loss(model(ids[:, :-1]), ids[:, 1:], reduction="none").sum(dim=1) for ids in inputs
        )
        return -F.logsigmoid(better - worse - reference)

    pairs = [((batch, batch.flip(1)), torch.zeros(4))]
    log = train(model, pairs, adamw(model), n_steps=30, loss=preference)
    assert log[1].loss == pytest.approx(math.log(2), abs=0.3) and log[-1].loss < 0.3
    assert log[-1].tokens == 30 * 4
    assert torch.equal(model.token_embedding.weight, frozen)


def test_distillation_learns_the_teacher_s_distribution():
    teacher, student, (inputs, targets) = build(seed=3).eval(), build(), random_batch()

    def divergence(model, inputs, targets):
        with torch.no_grad():
            wanted = teacher(inputs).log_softmax(dim=-1)
        return F.kl_div(model(inputs).log_softmax(dim=-1), wanted, reduction="none", log_target=True).sum(-1)

    log = train(student, [(inputs, targets)], adamw(student), n_steps=40, loss=divergence)
    assert log[1].tokens == targets.numel() and log[-1].loss < 0.2 * log[1].loss


def test_every_record_is_shown_as_it_is_made_and_outlives_an_explosion():
    model, seen = build(), []
    log = train(model, [random_batch()], adamw(model), n_steps=3, on_step=seen.append)
    assert seen == log[1:]
    seen.clear()
    with pytest.raises(FloatingPointError, match=r"step \d+") as caught:
        train(
            model,
            [random_batch()],
            torch.optim.SGD(model.parameters(), lr=1e6),
            n_steps=50,
            max_grad_norm=None,
            on_step=seen.append,
        )
    assert str(caught.value).startswith(f"step {len(seen) + 1}:")
