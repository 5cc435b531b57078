"""Wrong calls name what is wrong: each argument of the public functions is replaced by each of many things."""

import math

import numpy as np
import pytest
import torch

from qrnn import QRNN, QRNNLayer, pool, signed_pool
from qrnn.search import beam_search
from qrnn.seq2seq import QRNNSeq2Seq

ARRAY = torch.zeros(2, 5, 4)
MODEL = QRNNSeq2Seq(9, 7, 4, 6, 1)
SOURCE, LENGTHS, TARGET = (
    torch.zeros(2, 5, dtype=torch.int64),
    torch.tensor([5, 3]),
    torch.ones(2, 3, dtype=torch.int64),
)

THINGS = {
    "None": None,
    "text": "text",
    "a list": [1.5, [2]],
    "a dict": {"x": 1},
    "a float": 0.5,
    "NaN": math.nan,
    "a bool": True,
    "minus one": -1,
    "a huge number": 2**70,
    "a function": len,
    "a numpy array": np.zeros((2, 5, 4)),
    "a sparse tensor": ARRAY.to_sparse(),
    "a tensor of whole numbers": torch.zeros(2, 5, 4, dtype=torch.int64),
    "a complex tensor": ARRAY.to(torch.complex64),
    "a scalar": torch.tensor(1.0),
    "a tensor with more dimensions": ARRAY.unsqueeze(0),
    "an empty tensor": torch.zeros(0),
    "a tensor on another device": ARRAY.to("meta"),
    "float64": ARRAY.double(),
    "a tuple": (ARRAY, "x"),
}
LAYER, RNN = QRNNLayer(4, 6), QRNN(4, 6)
CALLS = {
    "pool": (pool, {"log_f": ARRAY, "log_x": ARRAY, "h0": ARRAY[:, 0], "method": "scan", "block_size": 4}),
    "signed_pool": (signed_pool, {"log_f": ARRAY, "log_i": ARRAY, "z": ARRAY, "h0": ARRAY[:, 0]}),
    "QRNNLayer": (
        QRNNLayer,
        dict.fromkeys(("input_size", "hidden_size", "kernel_size"), 3) | {"mode": "f", "zoneout": 0.1},
    ),
    "QRNNLayer, options": (
        lambda **options: QRNNLayer(4, 6, **options),
        {"activation": "tanh", "bias": True, "mean_zoneout": True, "method": "log"},
    ),
    "layer": (LAYER, {"x": ARRAY, "state": LAYER(ARRAY)[1], "lengths": [5, 3]}),
    "QRNN": (
        lambda **options: QRNN(4, 6, **options),
        {"num_layers": 2, "bias": True, "batch_first": True, "dropout": 0.1, "bidirectional": True, "proj_size": 0}
        | {
            "kernel_size": 2,
            "first_kernel_size": 1,
            "mode": "fo",
            "zoneout": 0.0,
            "mean_zoneout": True,
            "activation": "tanh",
            "dense": False,
        },
    ),
    "stack": (RNN, {"input": ARRAY, "hx": RNN(ARRAY)[1]}),
    "QRNNSeq2Seq": (
        lambda **options: QRNNSeq2Seq(**{"source_vocabulary": 9, "target_vocabulary": 7, **options}),
        {"source_vocabulary": 9, "target_vocabulary": 7, "embedding_size": 4, "hidden_size": 6, "num_layers": 1}
        | {
            "dropout": 0.0,
            "kernel_size": 2,
            "first_kernel_size": 2,
            "causal_encoder": True,
            "mode": "fo",
            "zoneout": 0.0,
            "mean_zoneout": True,
            "activation": "tanh",
        },
    ),
    "seq2seq": (MODEL, {"source": SOURCE, "source_lengths": LENGTHS, "target": TARGET}),
    "beam_search": (
        lambda **options: beam_search(MODEL, SOURCE, LENGTHS, **options),
        {"bos": 0, "eos": 1, "beam_size": 2, "length_penalty": 0.5, "max_length": 3},
    ),
}


# an array that fits by itself is taken for the right one, and the next is named
ALSO = {"log_f": ("log_x", "log_i"), "input": ("x", "hx"), "first_kernel_size": ("kernel_size",)}
CASES = [(function, argument) for function, (_, given) in CALLS.items() for argument in given]


def named(error, argument):
    """Whether the message begins with the argument, or with a part of it such as state.c or hx[0]."""
    return str(error).startswith((argument, *ALSO.get(argument, ())))


@pytest.mark.parametrize(("function", "argument"), CASES)
def test_a_wrong_argument_is_named_or_taken(function, argument):
    call, arguments = CALLS[function]
    for thing, value in THINGS.items():
        if thing == "a huge number" and argument not in ("bos", "eos", "length_penalty", "dropout", "zoneout"):
            continue  # legal, if there is memory for it
        try:
            call(**arguments | {argument: value})
        except (TypeError, ValueError) as error:
            assert named(error, argument), (thing, error)
        except Exception as error:
            pytest.fail(f"{thing}: {error!r}")
