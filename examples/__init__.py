"""The paper's other two tasks, QRNN against LSTM: `python -m examples.sentiment`, `python -m examples.translation`."""
