"""The quasi-recurrent network in plain PyTorch: a layer, a stack that takes the place of nn.LSTM, and the pooling."""

from importlib.metadata import PackageNotFoundError, version

from qrnn.stack import QRNN
from qrnn_layer import QRNNLayer, QRNNState, closed_form, pool, signed_pool

try:
    __version__ = version("qrnn-pooling")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"

__all__ = ["QRNN", "QRNNLayer", "QRNNState", "__version__", "closed_form", "pool", "signed_pool"]
