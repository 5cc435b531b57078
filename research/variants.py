"""experiment.py with changes that are no option of it: `python -m research.variants quarter,locked --preset small`.

quarter  train on the first quarter of the text, so that a run soon shows how well a model carries over to other text
locked   draw one dropout mask for all steps of a row (variational dropout, Gal & Ghahramani 2016)
skip     add the input of each layer but the first to its output (an addition to the paper)
gain     draw the initial weights as --initialisation scaled does, whatever that flag says (a name of runs on record)
spread   spread the forget biases so that channels remember for 2 to 70 steps at first (Tallec & Ollivier 2018)
average  evaluate with weights that are averaged over about the last epoch (Polyak & Juditsky 1992)

The changes come first, joined by commas. The flags after them are those of experiment.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from experiment import LanguageModelling, build_model
from lab.batches import StreamBatches
from lab.command_line import exit_code, parse
from lab.language_model import LanguageModel
from lab.parser import Parser
from lab.presets import PRESETS, Config
from lab.run import run
from lab.settings import InputError
from lab.training import Carried
from qrnn import QRNN

CHANGES = ("quarter", "locked", "skip", "gain", "spread", "average")
LONGEST = 70  # steps, of the time scales of "spread"


class LockedDropout(nn.Module):
    """Drop out of (B, T, H) by a mask, (B, 1, H), that is the same at all steps."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(probability)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.dropout(torch.ones_like(x[:, :1]))


class Stack(nn.Module):
    """Run recurrent layers one after the other, with dropout and perhaps a skip connection between them.

    Args:
        layers: (B, T, F), state -> (B, T, H), state.
        dropout: on the outputs of all layers but the last.
        skip: whether each layer but the first adds its input to its output.
    """

    def __init__(self, layers: Sequence[nn.Module], dropout: nn.Module, skip: bool) -> None:
        super().__init__()
        self.layers, self.dropout, self.skip = nn.ModuleList(layers), dropout, skip

    def forward(self, x: Tensor, states: tuple | None = None) -> tuple[Tensor, tuple]:
        after = []
        for index, layer in enumerate(self.layers):
            inputs = self.dropout(x) if index else x
            x, state = layer(inputs, None if states is None else states[index])
            x = x + inputs if index and self.skip else x
            after.append(state)
        return x, tuple(after)


class Averaged(nn.Module):
    """Train the model; evaluate with the exponential mean of its weights.

    Args:
        model: (B, T), state -> (B, T, vocabulary), state.
        steps: of the optimiser, over which the mean goes, about.
    """

    def __init__(self, model: LanguageModel, steps: int) -> None:
        super().__init__()
        self.model, self.hidden = model, model.hidden
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(1 - 1 / steps)).requires_grad_(False)

    @property
    def rnn(self) -> nn.Module:
        return self.model.rnn

    @property
    def embedding(self) -> nn.Embedding:
        return self.model.embedding

    def forward(self, words: Tensor, state: Carried = None) -> tuple[Tensor, Carried]:
        if not self.training:
            return self.average(words, state)
        self.average.update_parameters(self.model)  # with the weights that the step before made
        return self.model(words, state)


def single_layers(rnn: QRNN | nn.LSTM) -> list[nn.Module]:
    """Return the layers of a stack as stacks of one layer, with the same weights."""
    sizes = [(rnn.input_size, rnn.hidden_size), *[(rnn.hidden_size, rnn.hidden_size)] * (rnn.num_layers - 1)]
    singles: list[nn.Module] = []
    for index, size in enumerate(sizes):
        if isinstance(rnn, nn.LSTM):
            single: nn.Module = nn.LSTM(*size, batch_first=True)
            end = f"_l{index}"
            mine = {name.replace(end, "_l0"): value for name, value in rnn.state_dict().items() if name.endswith(end)}
        else:
            layer = rnn.layers[index]
            options: dict[str, Any] = {"mode": rnn.mode, "activation": layer.activation, "zoneout": layer.zoneout}
            options |= {"mean_zoneout": layer.mean_zoneout, "method": layer.method}
            options["first_kernel_size"] = layer.kernel_size
            single = QRNN(*size, batch_first=True, **options)
            mine = {f"layers.0.{name}": value for name, value in layer.state_dict().items()}
        single.load_state_dict(mine)
        singles.append(single)
    return singles


@torch.no_grad()
def spread_forget_biases(rnn: nn.Module, hidden: int) -> None:
    """Let the forget gates of every layer start near 1 - 1/S, with time scales S drawn from 2 to `LONGEST`."""
    for name, bias in rnn.named_parameters():
        if name.endswith("bias") or "bias_ih" in name:
            bias[hidden : 2 * hidden] = torch.empty(hidden).uniform_(1, LONGEST - 1).log()  # of S - 1
        elif "bias_hh" in name:
            bias[hidden : 2 * hidden] = 0


class VariantModelling(LanguageModelling):
    """Predict the next word, changed."""

    def __init__(self, config: Config, processes: int, changes: Sequence[str]) -> None:
        super().__init__(config, processes)
        self.changes = changes
        if "quarter" in changes:
            stream = cast(StreamBatches, self.train)
            steps = stream.inputs.shape[1] // 4
            stream.inputs, stream.targets = stream.inputs[:, :steps], stream.targets[:, :steps]
            stream.tokens = stream.inputs.numel()
            self.fingerprint = self.fingerprint | {"train_tokens": stream.tokens}

    def build(self, name: str) -> LanguageModel:  # or what is called like one
        config = replace(self.config, initialisation="scaled") if "gain" in self.changes else self.config
        model = build_model(config, name, self.tokenizer.get_vocab_size())
        if "locked" in self.changes:
            model.dropout_embedding = LockedDropout(config.dropout_embedding)  # type: ignore[assignment]
            model.dropout_output = LockedDropout(config.dropout_output)  # type: ignore[assignment]
        if "spread" in self.changes:
            spread_forget_biases(model.rnn, model.hidden)
        if {"locked", "skip"} & {*self.changes}:
            between = LockedDropout(config.dropout) if "locked" in self.changes else nn.Dropout(config.dropout)
            model.rnn = Stack(single_layers(cast(QRNN | nn.LSTM, model.rnn)), between, "skip" in self.changes)
        if "average" in self.changes:
            return cast(LanguageModel, Averaged(model, len(self.train)))
        return model


def main(arguments: Sequence[str]) -> int:
    """Return the exit code of the experiment."""
    parser = Parser(__doc__)
    parser.add_argument("changes", help=f"some of {', '.join(CHANGES)}")
    options, flags = parser.parse_known_args(arguments)

    def command() -> int:
        changes = options.changes.split(",")
        if unknown := {*changes} - {*CHANGES}:
            raise InputError(f"changes: {', '.join(sorted(unknown))} given, some of {', '.join(CHANGES)} expected")
        config = parse(flags, PRESETS)
        if config.protocol != "stream" and "quarter" in changes:
            raise InputError("--protocol sentence: quarter cuts a stream, --protocol stream expected")
        if config.dense and {"locked", "skip"} & {*changes}:
            raise InputError("--dense: given with locked or skip, which build a stack of their own; leave it out")
        return run(config, lambda processes: VariantModelling(config, processes, changes))

    return exit_code(command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
