"""QRNN in the hands of the rest of PyTorch: compiled, exported, run as ONNX, in mixed precision, as an ensemble."""

import io

import onnxruntime
import pytest
import torch
from torch import nn
from torch.utils import _pytree

from qrnn import QRNN
from qrnn_layer import METHODS, QRNNLayer

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


@pytest.mark.parametrize("strict", (False, True))
def test_exports_with_state_for_any_batch_size(strict):
    rnn = build(2)
    state = state_after_some_steps(rnn, 2)
    shapes = {0: DYNAMIC}, ({1: DYNAMIC}, {1: DYNAMIC})
    program = torch.export.export(rnn, (draw(2, 3, 4), state), dynamic_shapes=shapes, strict=strict)
    x, state = draw(7, 3, 4), state_after_some_steps(rnn, 7)
    assert_same(program.module()(x, state), rnn(x, state))


@pytest.mark.parametrize("method", METHODS)
def test_exports_whatever_the_method(method):
    rnn = build(method=method, bidirectional=True)
    program = torch.export.export(rnn, (draw(2, 5, 4),), dynamic_shapes=({0: DYNAMIC},))
    assert_same(program.module()(draw(7, 5, 4)), rnn(draw(7, 5, 4)))


def test_the_closed_form_exports_for_any_length_too():
    rnn = build(method="log", bidirectional=True)
    program = torch.export.export(rnn, (draw(2, 5, 4),), dynamic_shapes=({0: DYNAMIC, 1: DYNAMIC},))
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


def run_onnx(module, arguments, dynamic_shapes, new_arguments):
    """What onnxruntime makes of new arguments after an export with others."""
    program = torch.onnx.export(module, arguments, dynamo=True, verbose=False, dynamic_shapes=dynamic_shapes)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    names = [given.name for given in session.get_inputs()]
    given = [part.numpy() for part in flat(new_arguments)]
    return [torch.from_numpy(part) for part in session.run(None, dict(zip(names, given, strict=True)))]


@ignore_leaf_spec
def test_onnxruntime_computes_the_same_layer_for_any_batch_size():
    torch.manual_seed(0)
    layer = QRNNLayer(4, 6, 3, "ifo", method="scan").eval()
    x = draw(5, 6, 4)
    assert_same(run_onnx(layer, (draw(2, 6, 4),), ({0: DYNAMIC},), (x,)), layer(x))


@ignore_leaf_spec
def test_onnxruntime_computes_the_same_step_of_a_stack_with_its_state():
    rnn = build(2, method="scan").eval()
    example, arguments = ((draw(batch, 1, 4), state_after_some_steps(rnn, batch)) for batch in (2, 3))
    got = run_onnx(rnn, example, ({0: DYNAMIC}, ({1: DYNAMIC}, {1: DYNAMIC})), arguments)
    assert_same(got, rnn(*arguments))


def run_traced_onnx(module, arguments, new_arguments):
    """What onnxruntime makes of new arguments after an export by the older exporter, which traces."""
    file, names = io.BytesIO(), ["x", "h", "c"]
    axes = {"x": {0: "batch"}, "h": {1: "batch"}, "c": {1: "batch"}}
    torch.onnx.export(module, arguments, file, dynamo=False, input_names=names, dynamic_axes=axes)
    session = onnxruntime.InferenceSession(file.getvalue())
    given = dict(zip(names, (part.numpy() for part in flat(new_arguments)), strict=True))
    return [torch.from_numpy(part) for part in session.run(None, given)]


@ignore_tracing
@pytest.mark.parametrize("method", ("auto", *METHODS))
def test_the_older_exporter_computes_the_same_for_any_batch_size(method):
    """Without care it writes a model whose output is all zeros, and says nothing."""
    rnn = build(2, method=method).eval()
    example, arguments = ((draw(batch, 7, 4), state_after_some_steps(rnn, batch)) for batch in (2, 3))
    assert_same(run_traced_onnx(rnn, example, arguments), rnn(*arguments))


@ignore_tracing
def test_an_exported_model_step_by_step_is_the_whole():
    rnn, x = build(2).eval(), draw(3, 5, 4)
    whole, last = rnn(x)
    state, steps = tuple(torch.zeros(2, 3, 6) for _ in range(2)), []
    for t in range(5):
        step, *state = run_traced_onnx(rnn, (draw(2, 1, 4), state_after_some_steps(rnn, 2)), (x[:, t : t + 1], state))
        steps.append(step)
    assert_same((torch.cat(steps, dim=1), *state), (whole, *last))


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


def test_data_parallel_without_a_gpu_is_the_module_itself():
    rnn, x = build(2, batch_first=False), draw(9, 4, 4)
    parallel = nn.DataParallel(rnn, dim=1)
    output, state = parallel(x)
    assert_same((output, state), rnn(x))
    assert_same(parallel(x, state), rnn(x, state))
