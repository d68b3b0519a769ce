"""What the tests of the service share; they are a part of their own: `pytest -m service`."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from shared.finetuning.classification import TextClassifier
from shared.serving.models import open_model
from tests.serving.running import running
from tests.serving.small import write_small_chat


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """Return a small model that chats, in a vocabulary of 300; what it says means nothing."""
    torch.manual_seed(3)
    path = write_small_chat(tmp_path_factory.mktemp("small") / "small.gguf")
    opened = replace(open_model(str(path), dtype="float32"), name="small")
    # Only ASCII is written: a logit of 0 is never the largest.
    tokenizer = opened.needed_tokenizer()
    strange = [i for i in range(tokenizer.n_vocab) if not tokenizer.decode_single_token_bytes(i).isascii()]
    with torch.no_grad():
        opened.model.token_embedding.weight[strange] = 0.0
    return opened


@pytest.fixture(scope="session")
def small_classifier(small):
    """Return a classifier over the small model."""
    torch.manual_seed(0)
    head = nn.Linear(small.model.config.emb_dim, 2)
    return TextClassifier(small.model, small.needed_tokenizer(), head, ("ham", "spam"), "small")


@pytest.fixture(scope="session")
def served(small, small_classifier):
    """Run one server for all tests that leave it as it was."""
    with running(small, classifier=("filter", lambda: small_classifier)) as found:
        yield found


@pytest.fixture(autouse=True)
def nothing_is_left(request):
    """After each test that uses the common server, it is idle."""
    yield
    if "served" in request.fixturenames:
        assert request.getfixturevalue("served").is_idle()
