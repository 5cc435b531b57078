"""QRNN in the hands of the rest of PyTorch: compiled, exported, run as ONNX, in mixed precision, on several devices."""

import io

import onnxruntime
import pytest
import torch
import torch.distributed as dist
from onnxruntime.quantization import quantize_dynamic
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils import _pytree

from qrnn import QRNN
from qrnn_layer import METHODS
from tests.processes import run_in_processes
from tests.versions import OLDEST, skip_in_oldest

VARIANTS = {
    "two layers": {"num_layers": 2},
    "both directions": {"bidirectional": True},
    "f": {"mode": "f"},
    "ifo": {"mode": "ifo", "activation": "tanh"},
    "windows": {"num_layers": 2, "dense": True, "kernel_size": 3, "first_kernel_size": 2},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)

DYNAMIC = torch.export.Dim.DYNAMIC

# torch's own use of its own deprecated check, when an exporter copies a graph
ignore_tracing = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
ignore_leaf_spec = pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*is deprecated:FutureWarning")


def build(*args, **kwargs):
    """4 features in, 6 channels, batch first."""
    torch.manual_seed(0)
    return QRNN(4, 6, *args, **{"batch_first": True, **kwargs})


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def state_after_some_steps(rnn, batch_size):
    return rnn(torch.randn(batch_size, 5, 4, generator=torch.Generator().manual_seed(2)))[1]


def flat(results):
    """Output and the tensors of the state, in a row."""
    return _pytree.tree_leaves(results)


def assert_same(got, want):
    for got_part, want_part in zip(flat(got), flat(want), strict=True):
        torch.testing.assert_close(got_part, want_part)


# --- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_state", (False, True))
@pytest.mark.parametrize("rnn", (build(2, dense=True), build(bidirectional=True)), ids=("dense", "both directions"))
def test_compiles_without_a_graph_break(rnn, with_state):
    torch._dynamo.reset()
    x = draw(2, 3, 4)
    arguments = (x, state_after_some_steps(rnn, 2)) if with_state else (x,)
    compiled = torch.compile(rnn, fullgraph=True, backend="aot_eager")
    results = [function(*arguments) for function in (compiled, rnn)]
    assert_same(*results)
    got, want = (torch.autograd.grad(output.square().sum(), tuple(rnn.parameters())) for output, _ in results)
    assert_same(got, want)


# --- torch.export ----------------------------------------------------------------------------------------------------


def for_any_batch_size(state):
    """The dynamic shapes of input and state, whatever the state is made of."""
    return {0: DYNAMIC}, _pytree.tree_map(lambda _: {1: DYNAMIC}, state)


@every_variant
def test_exports_with_state_for_any_batch_size(variant):
    rnn = build(**variant)
    (x, state), arguments = ((draw(batch, 5, 4), state_after_some_steps(rnn, batch)) for batch in (2, 7))
    program = torch.export.export(rnn, (x, state), dynamic_shapes=for_any_batch_size(state), strict=False)
    assert_same(program.module()(*arguments), rnn(*arguments))


@skip_in_oldest("its strict export takes no open size")
@pytest.mark.parametrize("method", METHODS)
def test_exports_whatever_the_method(method):
    rnn = build(method=method, bidirectional=True)
    program = torch.export.export(rnn, (draw(2, 5, 4),), dynamic_shapes=({0: DYNAMIC},), strict=True)
    assert_same(program.module()(draw(7, 5, 4)), rnn(draw(7, 5, 4)))


def test_the_closed_form_exports_for_any_length_too():
    rnn = build(method="log", bidirectional=True)
    program = torch.export.export(rnn, (draw(2, 5, 4),), dynamic_shapes=({0: DYNAMIC, 1: DYNAMIC},), strict=False)
    assert_same(program.module()(draw(3, 50, 4)), rnn(draw(3, 50, 4)))


def test_an_exported_program_can_be_saved():
    rnn, x, file = build(), draw(2, 5, 4), io.BytesIO()
    torch.export.save(torch.export.export(rnn, (x,)), file)
    file.seek(0)
    assert_same(torch.export.load(file).module()(x), rnn(x))


# --- torch.jit.trace -------------------------------------------------------------------------------------------------


@ignore_tracing
@pytest.mark.parametrize("method", ("auto", *METHODS))
def test_a_traced_module_can_be_saved(method):
    rnn, x, file = build(2, method=method), draw(2, 5, 4), io.BytesIO()
    state = state_after_some_steps(rnn, 2)
    torch.jit.save(torch.jit.trace(rnn, (x, state)), file)
    file.seek(0)
    assert_same(torch.jit.load(file)(x, state), rnn(x, state))


# --- ONNX ------------------------------------------------------------------------------------------------------------


def names_of(*arguments):
    return [f"input_{number}" for number in range(len(flat(arguments)))]


def traced(rnn, x, state):
    """A model by the older exporter, which traces."""
    file, (first, *others) = io.BytesIO(), names_of(x, state)
    axes = {first: {0: "batch"}} | {name: {1: "batch"} for name in others}
    torch.onnx.export(rnn, (x, state), file, dynamo=False, input_names=[first, *others], dynamic_axes=axes)
    return file.getvalue()


def exported(rnn, x, state):
    """A model by the newer exporter, the default since torch 2.9."""
    options = {"input_names": names_of(x, state), "dynamic_shapes": for_any_batch_size(state)}
    program = torch.onnx.export(rnn, (x, state), dynamo=True, verbose=False, **options)
    return program.model_proto.SerializeToString()


def run_onnx(model, *arguments):
    session = onnxruntime.InferenceSession(model)
    given = {name: part.numpy() for name, part in zip(names_of(*arguments), flat(arguments), strict=True)}
    taken = [given.name for given in session.get_inputs()]  # `traced` leaves out h of a single layer: it goes nowhere
    return [torch.from_numpy(part) for part in session.run(None, {name: given[name] for name in taken})]


every_exporter = pytest.mark.parametrize("exporter", (traced, exported))


@ignore_tracing
@ignore_leaf_spec
@every_exporter
@every_variant
def test_onnxruntime_computes_the_same_for_any_batch_size(variant, exporter):
    rnn = build(**variant).eval()
    example, arguments = ((draw(batch, 4, 4), state_after_some_steps(rnn, batch)) for batch in (2, 3))
    assert_same(run_onnx(exporter(rnn, *example), *arguments), rnn(*arguments))


@ignore_tracing
@pytest.mark.parametrize("method", METHODS)
def test_the_older_exporter_computes_the_same_whatever_the_method(method):
    """Without care it writes a model whose output is all zeros, and says nothing."""
    rnn = build(2, method=method).eval()
    arguments = draw(2, 7, 4), state_after_some_steps(rnn, 2)
    assert_same(run_onnx(traced(rnn, *arguments), *arguments), rnn(*arguments))


@ignore_tracing
@ignore_leaf_spec
@every_exporter
def test_an_exported_step_with_its_state_taken_again_and_again_is_the_whole(exporter):
    rnn, x = build(2, zoneout=0.3, mean_zoneout=True).eval(), draw(3, 5, 4)
    whole, last = rnn(x)
    model = exporter(rnn, draw(2, 1, 4), state_after_some_steps(rnn, 2))
    state, steps = [torch.zeros(2, 3, 6), torch.zeros(2, 3, 6)], []
    for step in x.split(1, dim=1):
        output, *state = run_onnx(model, step, state)
        steps.append(output)
    assert_same((torch.cat(steps, dim=1), *state), (whole, *last))


@ignore_tracing
def test_onnxruntime_quantises_the_weights_to_8_bits(tmp_path):
    """The line that the docstring of QRNN gives; `quantize_dynamic` of torch finds no nn.Linear."""
    rnn = QRNN(64, 128, 2, batch_first=True, activation="tanh").eval()
    x = draw(2, 7, 64)
    path, small = tmp_path / "qrnn.onnx", tmp_path / "qrnn-int8.onnx"
    torch.onnx.export(rnn, (x,), path, dynamo=False, input_names=names_of(x))
    quantize_dynamic(path, small)
    assert small.stat().st_size < path.stat().st_size / 3
    for got, want in zip(run_onnx(small, x), flat(rnn(x)), strict=True):
        assert (got - want).norm() < 0.03 * want.norm()


# --- mixed precision -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dense", (False, True))
@pytest.mark.parametrize("bidirectional", (False, True))
def test_autocast_computes_in_bfloat16_and_trains_the_float32_parameters(bidirectional, dense):
    rnn, x = build(3, bidirectional=bidirectional, dense=dense), draw(2, 50, 4)
    parameters = tuple(rnn.parameters())
    want, want_state = rnn(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, state = rnn(x)
        rnn(x, state)
    if dense:
        assert len(state) == 3  # and windows
    assert (output.dtype, state[1].dtype) == (torch.bfloat16, torch.float32)
    rnn(x, state)  # a state from inside is good outside
    got_gradients = torch.autograd.grad(output.float().square().sum(), parameters)
    want_gradients = torch.autograd.grad(want.square().sum(), parameters)
    eps = torch.finfo(torch.bfloat16).eps
    for name, got, wanted in (
        ("output", output.float(), want),
        ("c", state[1], want_state[1]),
        ("gradients", nn.utils.parameters_to_vector(got_gradients), nn.utils.parameters_to_vector(want_gradients)),
    ):
        assert (got - wanted).norm() < eps * wanted.norm(), name


# --- ensembles and replicas ------------------------------------------------------------------------------------------


def test_an_ensemble_runs_and_trains_in_one_call():
    members = [build(2, bidirectional=True) for _ in range(3)]
    for member in members:
        member.reset_parameters()
    x = draw(2, 9, 4)
    parameters, _ = torch.func.stack_module_state(members)

    def loss(parameters, x):
        output, _ = torch.func.functional_call(members[0], parameters, (x,))
        return output.square().sum(), output

    gradients, outputs = torch.func.vmap(torch.func.grad(loss, has_aux=True), in_dims=(0, None))(parameters, x)
    for number, member in enumerate(members):
        want, _ = member(x)
        want.square().sum().backward()
        torch.testing.assert_close(outputs[number], want)
        for name, parameter in member.named_parameters():
            torch.testing.assert_close(gradients[name][number], parameter.grad)


# --- several devices -------------------------------------------------------------------------------------------------


def test_data_parallel_without_a_gpu_is_the_module_itself():
    rnn, x = build(2, batch_first=False), draw(9, 4, 4)
    parallel = nn.DataParallel(rnn, dim=1)
    output, state = parallel(x)
    assert_same((output, state), rnn(x))
    assert_same(parallel(x, state), rnn(x, state))


def train_on_a_share_of_the_batch(wrap, whole=lambda gradient: gradient):
    """Compare output, state and gradients of two processes, half a batch each, with those of one that has it all."""
    alone, x, half = build(3, bidirectional=True), draw(4, 9, 4), slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    rnn = wrap(build(3, bidirectional=True))
    state = want_state = None
    for _ in range(2):  # the second time with the state of the first
        output, state = rnn(x[half], state)
        want, want_state = alone(x, want_state)
        want.square().mean().backward()
        output.square().mean().backward()
        assert_same((output, state), (want[half], [part[:, half] for part in want_state]))
        state, want_state = (_pytree.tree_map(torch.Tensor.detach, kept) for kept in (state, want_state))
    gradients = [whole(parameter.grad) for parameter in rnn.parameters()]
    assert_same(gradients, [parameter.grad for parameter in alone.parameters()])


def distributed_data_parallel():
    train_on_a_share_of_the_batch(nn.parallel.DistributedDataParallel)


def fully_sharded():
    def wrap(rnn):
        for layer in rnn.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(rnn, mesh=mesh)

    mesh = init_device_mesh("cpu", (2,))
    train_on_a_share_of_the_batch(wrap, lambda gradient: gradient.full_tensor())


CHECKS = {check.__name__: check for check in (distributed_data_parallel, fully_sharded)}
if OLDEST:
    del CHECKS["fully_sharded"]  # PyTorch 2.6 cannot do it on a CPU


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    return run_in_processes(CHECKS, 2, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("name", CHECKS)
def test_two_processes_train_as_one(failures, name):
    assert not failures[name], "\n".join(failures[name])
