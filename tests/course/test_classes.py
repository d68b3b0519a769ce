"""Classes that grow over cells: joined they behave as in the notebook, and what cannot be joined is refused."""

import copy
import inspect
import pickle
import sys
import types

import pytest
import torch

from tests.tools.classes import ContinuationError, join_classes

FIRST = '''
class Layer(nn.Module):
    """A layer that scales."""

    n_made = 0

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(float(size)))
'''
SECOND = '''
# How it computes.
class Layer(Layer):  # continued
    # In one product.
    def forward(self, x):
        """Scale."""
        return self.factor * self.weight * x

    @property
    def factor(self):
        return 2.0

    @factor.setter
    def factor(self, value):
        raise ValueError("fixed")
'''
THIRD = """
class Layer(Layer):  # continued
    limit = 7

    @staticmethod
    def double(x):
        return 2 * x

    @classmethod
    def small(cls):
        return cls(2)
"""


def in_module(name: str, *sources: str) -> types.ModuleType:
    """Run sources one after the other in a module of this name, as cells run in a notebook."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    exec("import torch\nfrom torch import nn\nfrom dataclasses import dataclass\n", module.__dict__)
    for source in sources:
        exec(source, module.__dict__)
    return module


def join(*sources: str, notebooks: tuple[str, ...] = ()) -> str:
    notebooks = notebooks or ("a.ipynb",) * len(sources)
    cells = enumerate(zip(notebooks, sources, strict=True), 1)
    return join_classes([(f"{book}, code cell {n}", book, source.strip()) for n, (book, source) in cells])


@pytest.fixture
def both():
    yield in_module("grown", FIRST, SECOND, THIRD), in_module("joined", join(FIRST, SECOND, THIRD))
    del sys.modules["grown"], sys.modules["joined"]


def test_the_joined_text_holds_one_class_with_all_parts_in_order():
    text = join(FIRST, SECOND, "LIMIT = 3", THIRD)
    assert text.count("class Layer") == 1 and "continued" not in text
    parts = [
        "n_made",
        "__init__",
        "# How it computes.",
        "# In one product.",
        "def forward",
        "limit = 7",
        "small",
        "LIMIT",
    ]
    assert [text.index(part) for part in parts] == sorted(text.index(part) for part in parts)


def test_results_state_pickles_copies_and_docstrings_agree(both):
    grown, joined = both
    a, b = grown.Layer(3), joined.Layer(3)
    x = torch.tensor([1.0, 2.0, 3.0])
    assert a(x).equal(b(x)) and a.factor == b.factor and a.limit == b.limit and a.double(4) == b.double(4)
    assert type(grown.Layer.small()) is grown.Layer and type(joined.Layer.small()) is joined.Layer
    assert isinstance(a, grown.Layer) and isinstance(b, torch.nn.Module)
    with pytest.raises(ValueError, match="fixed"):
        b.factor = 1
    b.load_state_dict(a.state_dict())
    assert list(a.state_dict()) == list(b.state_dict())
    for one in (a, b):
        assert pickle.loads(pickle.dumps(one))(x).equal(a(x)) and copy.deepcopy(one)(x).equal(a(x))
    for name in ("Layer", "Layer.forward"):
        docs = [inspect.getdoc(eval(name, module.__dict__)) for module in both]
        assert docs[0] == docs[1] and docs[0]
    public = [{n for n in dir(module.Layer) if n[0] != "_"} for module in both]
    assert public[0] == public[1]


def test_a_dataclass_may_gain_methods(both):
    first = "@dataclass(frozen=True)\nclass Point:\n    x: int\n    y: int = 2"
    second = "class Point(Point):  # continued\n    def total(self):\n        return self.x + self.y"
    grown, joined = in_module("grown", first, second), in_module("joined", join(first, second))
    for module in (grown, joined):
        point = module.Point(3)
        assert point.total() == 5 and point == module.Point(3) and hash(point) == hash(module.Point(3))
        assert repr(point) == "Point(x=3, y=2)" and pickle.loads(pickle.dumps(point)) == point


DATA = "@dataclass\nclass A:\n    x: int"
PLAIN = "class A:\n    x = 1\n    def f(self):\n        return 1"


AGAIN = "class A(A):  # continued\n    "


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([PLAIN, AGAIN + "def f(self):\n        return 2"], "A.f is already defined by a.ipynb, code cell 1"),
        ([PLAIN, AGAIN + "x = 2"], "A.x is already defined"),
        ([PLAIN, AGAIN + "y = 2", AGAIN + "y = 3"], "A.y is already defined by a.ipynb, code cell 2"),
        ([PLAIN, "class A(A, B):  # continued\n    y = 2"], r"is written 'class A\(A\):  # continued'"),
        ([PLAIN, "class A(B):  # continued\n    y = 2"], "with no other base"),
        ([PLAIN, "class A(A):\n    y = 2"], r"a continuation is written 'class A\(A\):  # continued'"),
        ([PLAIN, "@mark\n" + AGAIN + "y = 2"], "a decorator on a continuation of 'A'"),
        ([PLAIN, AGAIN + '"""More."""\n    y = 2'], "the docstring of 'A' stands in its first cell"),
        ([PLAIN, AGAIN + "def __init__(self):\n        super().__init__()"], "uses super in a continuation"),
        ([PLAIN, AGAIN + "def g(self):\n        return __class__"], "uses __class__ in a continuation"),
        (["class A(metaclass=M):\n    x = 1", AGAIN + "y = 2"], "the class keyword 'metaclass'"),
        (["@total_ordering\nclass A:\n    x = 1", AGAIN + "y = 2"], "decorated by 'total_ordering'"),
        (["class A(enum.Enum):\n    x = 1", AGAIN + "y = 2"], "is a Enum and cannot be continued"),
        (["class A(Protocol[T]):\n    x = 1", AGAIN + "y = 2"], "is a Protocol"),
        (["class A:\n    __slots__ = ('x',)", AGAIN + "y = 2"], "defines __slots__"),
        ([DATA, AGAIN + "y: int = 2"], "the dataclass 'A' was made without 'y'"),
        ([DATA, AGAIN + "def __post_init__(self):\n        pass"], "made without '__post_init__'"),
        ([AGAIN + "y = 2"], "continues 'A', which no cell before it promotes"),
        ([PLAIN, PLAIN], "'A' is already promoted by a.ipynb, code cell 1"),
        (["LIMIT = 1", "LIMIT = 2"], "'LIMIT' is already promoted"),
    ],
)
def test_what_cannot_be_joined_is_refused_with_the_cell(cells, message):
    with pytest.raises(ContinuationError, match=message) as error:
        join(*cells)
    assert str(error.value).startswith(f"a.ipynb, code cell {len(cells)}: ")
    assert "\n" not in str(error.value)


def test_a_class_is_continued_in_its_own_notebook_only():
    with pytest.raises(
        ContinuationError, match=r"continues 'A' of another notebook \(a.ipynb, code cell 1\)"
    ):
        join(PLAIN, "class A(A):  # continued\n    y = 2", notebooks=("a.ipynb", "b.ipynb"))


def test_an_ordinary_subclass_stays_a_class_of_its_own():
    text = join(PLAIN, "class B(A):\n    y = 2", "class B(B):  # continued\n    z = 3")
    assert "class B(A):\n    y = 2\n\n    z = 3" in text
