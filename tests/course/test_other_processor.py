"""Sums in another order: results stay right, exact ones exact, and what does not survive it is found."""

import copy
import io
import os
import subprocess
import sys

import pytest
import torch
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook
from torch import nn
from torch.nn import functional as F

from tests.course.test_notebooks import failed_cells, run_nbval
from tests.tools import checked_run, other_processor
from tests.tools.architecture import ROOT

# What every operator gives in torch's own order, in a process of its own, for the order in this one to be held against.
PRODUCTS = """
import sys, torch
torch.manual_seed(0)
dtype = getattr(torch, sys.argv[1])
a, b, c, x = (torch.randn(shape, dtype=torch.float64).to(dtype) for shape in ((5, 300), (300, 7), (7,), (300,)))
results = {
    "mm": a @ b,
    "addmm": torch.addmm(c, a, b, beta=0.5, alpha=2),
    "bmm": torch.bmm(a.expand(3, 5, 300), b.expand(3, 300, 7)),
    "baddbmm": torch.baddbmm(c, a[None], b[None]),
    "mv": a @ x,
    "addmv": torch.addmv(c[:5], a, x),
    "linear": torch.nn.functional.linear(a[None], b.T, c),
    "einsum": torch.einsum("ij,jk->ki", a, b),
}
"""


def products(dtype: str, seed: int) -> dict[str, torch.Tensor]:
    code = f"from tests.tools import other_processor\nother_processor.install({seed})\n{PRODUCTS}"
    code += "torch.save({k: v.double() for k, v in results.items()}, sys.stdout.buffer)"
    command = [sys.executable, "-c", code, dtype]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    return torch.load(io.BytesIO(done.stdout))


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-4), ("float64", 1e-12), ("bfloat16", 0.5)])
def test_products_are_right_and_differ_in_their_last_digits_by_seed(dtype, bound):
    own, first, second = (products(dtype, seed) for seed in (0, 1, 2))
    for name, expected in own.items():
        torch.testing.assert_close(first[name], expected, atol=bound, rtol=0)
        assert not first[name].equal(expected), name
        assert not first[name].equal(second[name]), name


def test_one_hot_products_stay_exact_and_short_sums_have_one_order():
    table = torch.randn(300, 7)
    assert (F.one_hot(torch.arange(300), 300).float() @ table).equal(table)
    a, b = torch.randn(4, 2, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    # Two terms are not cut. With `out=` torch computes by itself; whether it rounds once or twice is the processor's.
    assert (a @ b).equal(torch.mm(a, b, out=torch.empty(4, 5, dtype=torch.float64)))
    assert (torch.ones(4, 0) @ torch.ones(0, 5)).equal(torch.zeros(4, 5))


def test_gradients_flow_and_are_those_of_differences():
    layer = nn.Linear(9, 4).double()
    x, y = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 9), (2, 9, 5)))
    assert torch.autograd.gradcheck(layer, (x,))
    assert torch.autograd.gradcheck(lambda x, y: x @ y, (x, y))
    assert torch.autograd.gradcheck(lambda x, y: y[0].T @ x[0], (x, y))


def test_the_tests_themselves_run_under_it_and_a_second_seed_is_refused():
    seed = checked_run.seed_of_sums()
    other_processor.install(seed)
    if seed:
        with pytest.raises(RuntimeError, match=f"order of seed {seed}, asked for {seed + 1}"):
            other_processor.install(seed + 1)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 10_000])
def test_the_cut_lies_inside_and_moves_with_the_seed(size):
    cuts = {other_processor.cut(size, seed) for seed in range(1, 9)}
    assert all(1 <= k < max(2, size) for k in cuts)
    assert size < 64 or len(cuts) > 4


@pytest.mark.parametrize("value", ["-1", "one", "1.5", ""])
def test_a_seed_that_is_none_is_refused(monkeypatch, value):
    monkeypatch.setenv("OTHER_PROCESSOR", value)
    with pytest.raises(ValueError, match=f"OTHER_PROCESSOR must be a whole number.*{value!r}"):
        checked_run.seed_of_sums()


TRAIN = """
import torch
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
teacher = torch.randn(64, 10)
optimizer = torch.optim.SGD(model.parameters(), lr=0.35, momentum=0.9)
losses = []
for _ in range(300):
    inputs = torch.randn(64, 64)
    loss = nn.functional.cross_entropy(model(inputs), (inputs @ teacher).argmax(1))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
"""
CELLS = {
    "digits": "print(f'{sum(losses[-20:]) / 20:.3f}')",
    "a count with room": "print('the loss fell' if losses[-1] < losses[0] else 'the loss rose')",
    "one-hot": "print(torch.eye(50)[7] @ torch.arange(50.0).sqrt())",
    "surroundings": "import os\nprint({name: os.environ[name] for name in ('TQDM_DISABLE', 'OMP_NUM_THREADS')})",
    "names": "print(sorted(name for name in globals() if 'start' in name or name == 'sys'))",
}


@pytest.fixture(scope="module")
def trained_notebook():
    """Return a notebook that trains and prints, executed in torch's own order without any setting of a checked run."""
    cells = [new_code_cell(TRAIN), *map(new_code_cell, CELLS.values())]
    notebook = new_notebook(cells=cells)
    NotebookClient(notebook, kernel_name="python3").execute(env={**os.environ, **checked_run.CHECKED_RUN})
    return notebook


def failing(folder, notebook, **settings) -> tuple[set[str], str]:
    """Return the names of the cells that plain nbval finds different, and what it prints."""
    own = {*checked_run.CHECKED_RUN, checked_run.ORDER_OF_SUMS}
    environment = {name: value for name, value in os.environ.items() if name not in own}
    done = run_nbval(folder, notebook, environment | settings)
    names = ["training", *CELLS]
    return {names[number] for number in failed_cells(done)}, done.stdout + done.stderr


def test_plain_nbval_has_the_surroundings_of_a_checked_run_and_finds_what_does_not_survive(
    tmp_path, trained_notebook
):
    failed, output = failing(tmp_path, trained_notebook)
    assert failed == {"digits"}, output
    assert failing(tmp_path, trained_notebook, OTHER_PROCESSOR="0")[0] == set()


def test_what_the_user_has_set_stays(tmp_path, trained_notebook):
    failed, output = failing(tmp_path, trained_notebook, OTHER_PROCESSOR="0", TQDM_DISABLE="0")
    assert failed == {"surroundings"}, output
    failed, output = failing(tmp_path, trained_notebook, OTHER_PROCESSOR="x")
    assert "OTHER_PROCESSOR must be a whole number" in output


def test_a_spoiled_notebook_fails_in_another_order_as_in_torchs_own(tmp_path, trained_notebook):
    spoiled = copy.deepcopy(trained_notebook)
    spoiled.cells[2].outputs[0].text = "the loss rose\n"
    assert failing(tmp_path, spoiled)[0] == {"digits", "a count with room"}
