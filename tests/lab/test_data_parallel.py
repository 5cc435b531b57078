"""The stack under `DistributedDataParallel`, in 2 gloo processes, and under `DataParallel`.

`test_experiment.py` runs whole experiments in two processes; this is about the module alone.
"""

import copy
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from qrnn import QRNN
from qrnn_layer import MODES
from tests.processes import run_in_processes

every_mode = pytest.mark.parametrize("mode", MODES)


def make(mode, seed=0):
    torch.manual_seed(seed)
    rnn = QRNN(5, 6, 2, batch_first=True, mode=mode).double()
    generator = torch.Generator().manual_seed(1)
    return rnn, torch.randn(4, 20, 5, dtype=torch.float64, generator=generator)


def detach(state):
    return state.detach() if isinstance(state, torch.Tensor) else tuple(map(detach, state))


def train(rnn, x):
    """The gradients of two steps of truncated backpropagation; the second carries the state of the first."""
    optimizer, state, gradients = torch.optim.SGD(rnn.parameters(), lr=0.5), None, []
    for piece in x.split(10, dim=1):
        optimizer.zero_grad()
        output, state = rnn(piece, state)
        output.square().mean().backward()
        gradients += [parameter.grad.clone() for parameter in rnn.parameters()]
        optimizer.step()
        state = detach(state)
    return gradients


def gradients_are_those_of_the_global_batch(mode):
    rnn, x = make(mode, seed=dist.get_rank())  # the first rank's weights are broadcast
    parallel = DistributedDataParallel(rnn)  # with an unused parameter, the second step would raise
    alone = copy.deepcopy(rnn)
    got = train(parallel, x.chunk(dist.get_world_size())[dist.get_rank()])
    for gradient, wanted in zip(got, train(alone, x), strict=True):
        assert wanted.any()
        torch.testing.assert_close(gradient, wanted, rtol=1e-11, atol=1e-13)


CHECKS = {mode: partial(gradients_are_those_of_the_global_batch, mode) for mode in MODES}


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    return run_in_processes(CHECKS, 2, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("mode", CHECKS)
def test_gradients_of_two_processes_are_those_of_the_global_batch(failures, mode):
    assert not failures[mode], "\n".join(failures[mode])


@every_mode
def test_data_parallel_without_a_gpu_is_the_module(mode):
    rnn, x = make(mode)
    with mock.patch("torch.cuda.is_available", return_value=False):
        parallel = nn.DataParallel(rnn)
    torch.testing.assert_close(parallel(x)[0], rnn(x)[0])


@every_mode
def test_replicas_work_side_by_side(mode):
    """As `nn.DataParallel` has them, but for the copies to several GPUs: their parameters are plain tensors."""
    rnn, x = make(mode)
    copies = "torch.nn.parallel.replicate._broadcast_coalesced_reshape"
    with mock.patch(copies, lambda tensors, devices, detach=False: [[t.clone() for t in tensors] for _ in devices]):
        replicas = nn.parallel.replicate(rnn, [0, 1])
    with ThreadPoolExecutor() as threads:
        outputs = list(threads.map(lambda replica, part: replica(part)[0], replicas, x.chunk(2)))
    torch.testing.assert_close(torch.cat(outputs), rnn(x)[0])
    torch.cat(outputs).square().mean().backward()
    got = [parameter.grad.clone() for parameter in rnn.parameters()]
    rnn.zero_grad()
    rnn(x)[0].square().mean().backward()
    for gradient, parameter in zip(got, rnn.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


@every_mode
def test_no_state_stays_on_the_module(mode):
    rnn, x = make(mode)
    before = {name: dict(vars(module)) for name, module in rnn.named_modules()}
    rnn(x)
    for name, module in rnn.named_modules():
        assert vars(module).keys() == before[name].keys(), name
        assert all(value is before[name][key] for key, value in vars(module).items()), name
    assert not list(rnn.buffers())
