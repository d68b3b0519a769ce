"""`shared/pretraining/processes.py`: the device of a process, sums over processes, what only the first does.

Several processes are tested with the runs that they belong to, in test_pretrain.py.
"""

import pytest
import torch

from shared.pretraining import processes
from shared.pretraining.processes import Processes, shard_like, whole


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def test_auto_is_the_device_that_the_environment_names(monkeypatch):
    monkeypatch.setenv("LLM_DEVICE", "cpu")
    assert Processes("auto").device == torch.device("cpu")
    monkeypatch.setenv("LLM_DEVICE", "mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert Processes("auto").device == torch.device("mps")
    assert Processes("cpu").device == torch.device("cpu")


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_refused(device, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match=f"device must be a device of this machine .* got '{device}'"):
        Processes(device)


def test_a_device_of_another_kind_is_refused_and_who_named_it_is_said(monkeypatch):
    with pytest.raises(ValueError, match=r"^device must be auto, cpu, mps, cuda or cuda:N, got 'meta'"):
        Processes("meta")
    monkeypatch.setenv("LLM_DEVICE", "meta")
    with pytest.raises(ValueError, match=r"^LLM_DEVICE must be auto, cpu, mps, cuda or cuda:N, got 'meta'"):
        Processes("auto")


def test_several_processes_do_not_share_one_mps_device(monkeypatch):
    started = []
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(processes.dist, "init_process_group", lambda *given, **_: started.append(given))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LLM_DEVICE", "mps")
    with pytest.raises(ValueError, match="device must be cpu or cuda for 2 processes, got mps"):
        Processes("mps")
    assert Processes("auto").device == torch.device("cpu")
    assert started == [("gloo",)]


def test_a_process_alone_sums_itself_and_does_all_work():
    own = Processes("cpu")
    assert (own.rank, own.world_size) == (0, 1)
    total = own.total(torch.tensor([1.5, 2.5], dtype=torch.float32))
    assert total.dtype == torch.float64 and total.tolist() == [1.5, 2.5]
    assert own.on_first(lambda: 3) == 3
    with pytest.raises(OSError, match="full"):
        own.on_first(lambda: (_ for _ in ()).throw(OSError("full")))
    model = torch.nn.Linear(2, 2)
    assert own.parallelize(model, "ddp") is model
    own.close()


def test_what_is_not_sharded_stays_as_it_is():
    tensor = torch.ones(2)
    assert whole(tensor) is tensor and whole(3) == 3
    assert shard_like(tensor, None) is tensor and shard_like(tensor, torch.ones(2)) is tensor
