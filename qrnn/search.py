"""Beam search for any model with the methods `start` and `step` of `QRNNSeq2Seq`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from math import log
from numbers import Real
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from qrnn_layer import check_size, expect


class SearchModel(Protocol):
    """Name what a search needs of an nn.Module: `start` and `step` as in `QRNNSeq2Seq`, a state with `index_select`."""

    def modules(self) -> Iterator[nn.Module]: ...

    def eval(self) -> Any: ...

    def start(self, source: Tensor, source_lengths: Tensor) -> Any: ...

    def step(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any, Tensor | None]: ...


class Hypothesis(NamedTuple):
    """Hold a target that was found, on the CPU.

    Attributes:
        tokens: (n,) int64, without bos and eos.
        score: log-probability of the tokens and eos, over the length penalty.
        attention: (n + 1, S_b), a row for each token and one for eos, over the real tokens of the source; None if
            `step` gave none.
    """

    tokens: Tensor
    score: float
    attention: Tensor | None


def beam_search(
    model: SearchModel,
    source: Tensor,
    source_lengths: Tensor,
    *,
    bos: int,
    eos: int,
    beam_size: int = 8,
    length_penalty: float = 0.6,
    max_length: int,
) -> list[Hypothesis]:
    """Find the best target of each source by a beam search, in evaluation mode and without gradients.

    Hypotheses end where eos is among the `beam_size` best continuations of a sentence, and `beam_size` others go on.
    Those that ended are ranked by their log-probability over the length penalty of Wu et al. 2016 (arXiv 1609.08144,
    eq. 14), ((5 + length) / 6) ** length_penalty, where eos counts as a token. A sentence is finished, and leaves the
    batch, when none that goes on could still become better than the best that ended. With a `beam_size` of 1 and a
    `length_penalty` of 0 it is a greedy search: the likeliest token at each step.

    Args:
        model: any module with `start` and `step`; each step is one call for all hypotheses of all sentences.
        source, source_lengths: a batch of B, for `model.start`.
        bos, eos: tokens of the target.
        beam_size: hypotheses a sentence that go on after each step.
        length_penalty: alpha, at least 0; 0 ranks by the log-probability, more favours longer targets.
        max_length: most tokens of a hypothesis, one number for the batch. After as many, eos is forced, and its
            log-probability counts as that of any other.

    Returns:
        the best hypothesis of each of the B sentences.

    Raises:
        TypeError: if a size is no whole number.
        ValueError: if an argument is out of range, if the model knows a single token, or if it gives no target a finite
            log-probability (NaN).
    """
    beam_size, max_length = check_size("beam_size", beam_size), check_size("max_length", max_length)
    for name, token in (("bos", bos), ("eos", eos)):
        expect(check_size(name, token, least=0) < 2**63, name, token, "a token of the target")
    most = log(sys.float_info.max) / log((6 + max_length) / 6)  # beyond, the longest target's penalty is no float
    legal = isinstance(length_penalty, Real) and 0 <= length_penalty <= most
    expect(legal, "length_penalty", length_penalty, f"a number from 0 to {most:.0f}")

    def penalty(length: int) -> float:
        return ((5 + length) / 6) ** length_penalty

    with _evaluation(model):
        state = model.start(source, source_lengths)
        lengths = torch.as_tensor(source_lengths).tolist()
        sentences = torch.arange(len(source), device=source.device)  # (N,), those not finished
        state = state.index_select(sentences.repeat_interleave(beam_size))
        prefixes = source.new_full((len(source) * beam_size, 1), bos)  # (N * beams, 1 + step)
        trail = torch.zeros(len(prefixes), 0, source.shape[1], device=source.device)  # (N * beams, step, S), alpha
        log_p = torch.zeros(len(source), beam_size, device=source.device)  # (N, beams), of the prefixes
        log_p[:, 1:] = -torch.inf  # at first all are the same, and one is enough
        best = log_p.new_full((len(source),), -torch.inf, dtype=torch.float64)  # (N,), scores of what is found
        found: list[Hypothesis | None] = [None] * len(source)

        for step in range(max_length + 1):
            try:
                logits, state, attention = model.step(prefixes[:, -1], state)  # (N * beams, V)
            except (ValueError, IndexError) as error:
                expect(step > 0, "bos", bos, f"a token that the model takes ({error})")
                raise
            if attention is not None:
                trail = torch.cat([trail, attention.unsqueeze(1)], dim=1)
            totals = log_p.unsqueeze(2) + _log_softmax(logits, eos, step == max_length).unflatten(0, log_p.shape)
            top, rows, tokens = _continuations(totals, 2 * beam_size)  # (N, 2 * beams), best first
            ended = tokens == eos  # half of them at most, one a prefix: `beam_size` others are left

            likeliest, place = top.masked_fill(~ended, -torch.inf)[:, :beam_size].max(dim=1)
            score = likeliest.double() / penalty(step + 1)  # in float32 a large penalty leaves 0
            for n in (score > best).nonzero().flatten().tolist():
                sentence, row = int(sentences[n]), int(rows[n, place[n]])
                seen = None if attention is None else trail[row, :, : lengths[sentence]].cpu()
                found[sentence] = Hypothesis(prefixes[row, 1:].cpu(), score[n].item(), seen)
            best = torch.maximum(best, score)

            log_p, place = top.masked_fill(ended, -torch.inf).topk(beam_size)  # (N, beams)
            # a log-probability only falls and the penalty only grows: no hypothesis can reach more than this
            going_on = log_p[:, 0].double() / penalty(max_length + 1) > best
            if not going_on.any():
                break
            sentences, best, log_p = sentences[going_on], best[going_on], log_p[going_on]
            rows, tokens = (array.gather(1, place)[going_on].flatten() for array in (rows, tokens))  # (N * beams,)
            prefixes = torch.cat([prefixes[rows], tokens.unsqueeze(1)], dim=1)
            trail, state = trail[rows], state.index_select(rows)

    if None in found:
        raise ValueError(f"model: no target of finite probability for sentence {found.index(None)}: NaN parameters?")
    return [hypothesis for hypothesis in found if hypothesis is not None]


@contextmanager
def _evaluation(model: SearchModel) -> Iterator[None]:
    """Switch to evaluation mode and no gradients; afterwards every module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _log_softmax(logits: Tensor, eos: int, force_eos: bool) -> Tensor:
    """Return log-probabilities of the next token, (rows, V), at least float32; only that of eos with `force_eos`."""
    vocabulary = logits.shape[1]
    if vocabulary < 2:
        raise ValueError(f"model: logits of {vocabulary} token given, 2 or more expected: eos and another")
    if not 0 <= eos < vocabulary:
        raise ValueError(f"eos: {eos!r} given, a token from 0 to {vocabulary - 1} expected")
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=1)
    others = torch.arange(vocabulary, device=logits.device) != eos
    return log_p.masked_fill(others, -torch.inf) if force_eos else log_p


def _continuations(totals: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Find the best continuations of each sentence, from the log-probabilities (N, beams, V) of all.

    Returns three (N, number), best first: log-probabilities, the rows of the prefixes, of N * beams, and the tokens.
    """
    sentences, beams, vocabulary = totals.shape
    top, choice = totals.flatten(1).topk(number)
    first_rows = torch.arange(0, sentences * beams, beams, device=totals.device).unsqueeze(1)  # (N, 1)
    return top, first_rows + choice // vocabulary, choice % vocabulary
