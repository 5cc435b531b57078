"""The encoder-decoder against eq. 7-8 written out step by step, the searches against plain and exhaustive ones."""

import copy
import itertools
import math
import pickle
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from qrnn.fast import FastQRNNLayer
from qrnn.search import beam_search
from qrnn.seq2seq import CentredLayer, DecoderLayer, QRNNSeq2Seq, attend
from qrnn_layer import ACTIVATIONS, QRNNLayer, ShapeError, signed_pool

SOURCE_VOCABULARY, TARGET_VOCABULARY, BOS, EOS = 9, 7, 0, 1
LENGTHS = torch.tensor([6, 1, 4])

every_mode = pytest.mark.parametrize("mode", ("fo", "ifo"))
every_encoder = pytest.mark.parametrize("causal_encoder", (True, False))


def make(dtype=torch.float64, hidden_size=6, num_layers=3, dropout=0.0, **options):
    """A model whose attention is far from uniform, and a batch: source (3, 6), target (3, 5)."""
    torch.manual_seed(0)
    model = QRNNSeq2Seq(
        SOURCE_VOCABULARY, TARGET_VOCABULARY, 4, hidden_size, num_layers, dropout, dtype=dtype, **options
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model, torch.randint(SOURCE_VOCABULARY, (3, 6)), torch.randint(TARGET_VOCABULARY, (3, 5))


# --- the model: against the paper, one sentence, one step, one tap at a time ------------------------------------------


def reference_layer(layer, x, condition):
    """c and o (T, H) of inputs x (T, F), with `condition` added to the convolution (eq. 7)."""
    width = layer.kernel_size
    weight = layer.weight.view(-1, width, layer.input_size)
    ahead = (width - 1) // 2 if isinstance(layer, CentredLayer) else 0
    c, steps, gates = x.new_zeros(layer.hidden_size), [], []
    for t in range(len(x)):
        y = layer.bias + condition
        for k in range(width):
            s = t + ahead - (width - 1) + k
            if 0 <= s < len(x):
                y = y + weight[:, k] @ x[s]
        blocks = y.chunk(len(y) // layer.hidden_size)
        z, f, o = ACTIVATIONS[layer.activation](blocks[0]), blocks[1].sigmoid(), blocks[-1].sigmoid()
        c = f * c + (blocks[2].sigmoid() if layer.mode == "ifo" else 1 - f) * z
        steps.append(c)
        gates.append(o)
    return torch.stack(steps), torch.stack(gates)


def reference(model, source, target):
    """Logits (T, V) and attention (T, S) of one sentence without padding."""
    h, last_states = model.source_embedding.weight[source], []
    for layer in model.encoder:
        c, o = reference_layer(layer, h, torch.zeros(()))
        h = o * c
        last_states.append(c[-1])
    keys = h
    h = model.target_embedding.weight[target]
    for layer, v, last in zip(model.decoder, model.conditions, last_states, strict=True):
        c, o = reference_layer(layer, h, v.weight @ last)
        h = o * c
    logits, attention = [], []
    for t in range(len(target)):
        scores = torch.stack([c[t] @ key for key in keys])
        alpha = scores.softmax(0)
        k = sum(alpha[s] * keys[s] for s in range(len(keys)))
        h_t = o[t] * (model.w_k.weight @ k + model.w_c.weight @ c[t] + model.w_c.bias)
        logits.append(model.output.weight @ h_t + model.output.bias)
        attention.append(alpha)
    return torch.stack(logits), torch.stack(attention)


@pytest.mark.parametrize(("kernel_size", "first_kernel_size"), ((1, None), (2, 6), (3, 1)))
@pytest.mark.parametrize("activation", ("tanh", "softplus"))
@every_encoder
@every_mode
def test_model_is_the_papers(mode, causal_encoder, activation, kernel_size, first_kernel_size):
    model, source, target = make(
        mode=mode,
        causal_encoder=causal_encoder,
        activation=activation,
        kernel_size=kernel_size,
        first_kernel_size=first_kernel_size,
    )
    logits, attention = model(source, LENGTHS, target, return_attention=True)
    for row, length in enumerate(LENGTHS):
        want_logits, want_attention = reference(model, source[row, :length], target[row])
        torch.testing.assert_close(logits[row], want_logits, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(attention[row, :, :length], want_attention, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("dtype", "bound"), ((torch.float32, 1e-5), (torch.float64, 1e-10)))
@pytest.mark.parametrize(("kernel_size", "first_kernel_size"), ((1, None), (2, 6), (4, 2)))
@every_encoder
@every_mode
def test_step_by_step_is_the_whole(mode, causal_encoder, kernel_size, first_kernel_size, dtype, bound):
    model, source, _ = make(
        dtype, mode=mode, causal_encoder=causal_encoder, kernel_size=kernel_size, first_kernel_size=first_kernel_size
    )
    target = torch.randint(TARGET_VOCABULARY, (3, 20))
    want_logits, want_attention = model(source, LENGTHS, target, return_attention=True)
    state = model.start(source, LENGTHS)
    for t in range(target.shape[1]):
        logits, state, attention = model.step(target[:, t], state)
        torch.testing.assert_close(logits, want_logits[:, t], rtol=0, atol=bound)
        torch.testing.assert_close(attention, want_attention[:, t], rtol=0, atol=bound)


# --- the layers -------------------------------------------------------------------------------------------------------


def test_a_centred_layer_sees_as_far_ahead_as_behind_and_no_padding():
    torch.manual_seed(0)
    layer = CentredLayer(4, 6, kernel_size=6).double()  # t - 3 ... t + 2
    x = torch.randn(2, 12, 4, dtype=torch.float64)
    changed = x.clone()
    changed[:, 7] += 1
    assert torch.equal(layer(x)[0][:, :5], layer(changed)[0][:, :5])
    assert not torch.equal(layer(x)[0][:, 5], layer(changed)[0][:, 5])

    bias = layer.bias.view(3, 6)
    padded = torch.nn.functional.pad(x, (0, 0, 3, 2))
    z, f, o = (  # the definition, tap by tap
        bias[block] + sum(padded[:, k : k + 12] @ layer.weight.view(3, 6, 6, 4)[block, :, k].T for k in range(6))
        for block in range(3)
    )
    want = torch.sigmoid(o) * signed_pool(
        torch.nn.functional.logsigmoid(f), torch.nn.functional.logsigmoid(-f), torch.tanh(z)
    )
    torch.testing.assert_close(layer(x)[0], want)

    padded, lengths = x.clone(), [12, 7]
    padded[1, 7:] = torch.nan
    h, state = layer(padded, lengths=lengths)
    alone, state_alone = layer(x[1:, :7])
    torch.testing.assert_close(h[1:, :7], alone)
    torch.testing.assert_close(state.c[1:], state_alone.c)


@every_mode
def test_a_condition_is_added_at_every_step_as_a_bias_of_each_sequence(mode):
    torch.manual_seed(0)
    layer = DecoderLayer(4, 6, mode=mode)
    x, condition = torch.randn(2, 9, 4), torch.randn(2, len(layer.weight))
    c, o, state = layer.cells(x, layer.initial_state(2, x), condition)
    for row in range(2):
        told = QRNNLayer(4, 6, mode=mode)
        told.load_state_dict(layer.state_dict())
        with torch.no_grad():
            told.bias += condition[row]
        h, last = told(x[row : row + 1])
        torch.testing.assert_close((o * c)[row : row + 1], h)
        torch.testing.assert_close([part[row : row + 1] for part in state], list(last))


def test_a_centred_layer_takes_no_state():
    layer, x = CentredLayer(4, 6), torch.zeros(2, 5, 4)
    with pytest.raises(ValueError, match=r"^state: "):
        layer(x, layer.initial_state(2, x))


# --- the model: padding, batches, time --------------------------------------------------------------------------------


@every_encoder
def test_padding_of_the_source_is_never_seen(causal_encoder):
    model, source, target = make(causal_encoder=causal_encoder, first_kernel_size=4)
    want = model(source, LENGTHS, target)
    padding = torch.arange(6) >= LENGTHS.unsqueeze(1)
    for garbage in (0, 5, -100, 10**9):
        assert torch.equal(model(source.masked_fill(padding, garbage), LENGTHS, target), want)
    longer = torch.cat([source, torch.full((3, 4), 8)], dim=1)
    torch.testing.assert_close(model(longer, LENGTHS, target), want)

    want.sum().backward()  # tokens that are only in the padding are not learnt from
    real = set(source[~padding].tolist())
    unseen = [token for token in range(SOURCE_VOCABULARY) if token not in real]
    assert unseen and not model.source_embedding.weight.grad[unseen].any()


@every_encoder
def test_a_sentence_alone_is_the_same_as_in_a_batch(causal_encoder):
    model, source, target = make(causal_encoder=causal_encoder, first_kernel_size=4)
    logits = model(source, LENGTHS, target)
    for row, length in enumerate(LENGTHS):
        alone = model(source[row : row + 1, :length], LENGTHS[row : row + 1], target[row : row + 1])
        torch.testing.assert_close(logits[row : row + 1], alone)


@pytest.mark.parametrize("kernel_size", (1, 2, 5))
@every_mode
def test_no_logit_sees_a_later_token_of_the_target(mode, kernel_size):
    model, source, _ = make(torch.float32, mode=mode, kernel_size=kernel_size, causal_encoder=False)
    target = torch.randint(TARGET_VOCABULARY, (3, 12))
    changed = target.clone()
    changed[:, 7:] = (target[:, 7:] + 1) % TARGET_VOCABULARY
    before, after = model(source, LENGTHS, target), model(source, LENGTHS, changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7], after[:, 7])


class _CountOperations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_no_loop_over_time_in_training(monkeypatch):
    """64 times as many tokens are 6 more levels of the scan, not more operations a step, forward and backward.

    So it is with the plain layers; the fast ones of the encoder go through time in pieces, for the cache of a CPU.
    """
    monkeypatch.setattr(FastQRNNLayer, "_is_fast", lambda *_: False)
    model, *_ = make(torch.float32, num_layers=2)

    def count(time):
        source, target = torch.ones(1, time, dtype=torch.long), torch.ones(1, time, dtype=torch.long)
        with _CountOperations() as counter:
            model(source, [time], target).sum().backward()
        return counter.count

    count(4)  # gradients that are there already are added to
    assert count(64 * 16) - count(16) <= 4 * 2 * 6 * 40  # layers, directions, levels, operations a level


def test_a_target_without_tokens():
    model, source, target = make()
    logits, attention = model(source, LENGTHS, target[:, :0], return_attention=True)
    assert logits.shape == (3, 0, TARGET_VOCABULARY) and attention.shape == (3, 0, 6)


# --- the model: attention ---------------------------------------------------------------------------------------------


def test_attention_is_a_distribution_over_the_real_tokens():
    model, source, target = make(torch.float32)
    _, attention = model(source, LENGTHS, target, return_attention=True)
    assert attention.shape == (3, 5, 6)
    torch.testing.assert_close(attention.sum(dim=2), torch.ones(3, 5))
    for row, length in enumerate(LENGTHS):
        assert (attention[row, :, length:] == 0).all()
        assert (attention[row, :, :length] > 0).all()


def test_attention_is_finite_for_any_size_of_states():
    c = 1e4 * torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
    padding = torch.tensor([[False] * 4, [True] * 4])  # a source without tokens is an error, but not NaN
    k, weights = attend(c, c[:, :4], padding)
    assert k.isfinite().all() and weights.isfinite().all()


def test_attention_does_not_change_the_cell_states():
    model, source, target = make()
    state = model.start(source, LENGTHS)
    other = state._replace(keys=state.keys + 1)
    logits, after, _ = model.step(target[:, 0], state)
    other_logits, other_after, _ = model.step(target[:, 0], other)
    assert not torch.equal(logits, other_logits)
    for got, want in zip(other_after.layers, after.layers, strict=True):
        assert torch.equal(got.c, want.c) and torch.equal(got.window, want.window)


# --- the model: as a module -------------------------------------------------------------------------------------------


@every_mode
def test_every_parameter_gets_a_gradient(mode):
    model, source, target = make(mode=mode)
    model(source, LENGTHS, target).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        if "embedding" in name:
            used = (source if "source" in name else target).unique().numel()
            assert 0 < parameter.grad.any(dim=1).sum() <= used, name
        else:
            assert parameter.grad.flatten(1).any(dim=1).all() if parameter.dim() > 1 else parameter.grad.all(), name


def test_dropout_is_between_layers_only():
    model, source, target = make(num_layers=1, dropout=0.9)
    assert torch.equal(model(source, LENGTHS, target), model.eval()(source, LENGTHS, target))

    model, source, target = make(num_layers=2, dropout=1.0)  # the last layers are fed zeros
    start = model.start(source, LENGTHS)
    assert torch.equal(start.keys[0], model.start((source + 1) % SOURCE_VOCABULARY, LENGTHS).keys[0])
    logits = model.step(target[:, 0], start)[0]
    assert torch.equal(logits, model.step(target[:, 1], start)[0])
    model.eval()
    assert not torch.equal(model.step(target[:, 0], start)[0], model.step(target[:, 1], start)[0])


def test_zoneout_is_in_training_only():
    model, source, target = make(zoneout=0.5)
    assert not torch.equal(model(source, LENGTHS, target), model(source, LENGTHS, target))
    model.eval()
    assert torch.equal(model(source, LENGTHS, target), model(source, LENGTHS, target))


def test_options_reach_their_layers():
    options = {"method": "blocked", "activation": "relu", "zoneout": 0.3, "mean_zoneout": True}
    model, *_ = make(kernel_size=3, first_kernel_size=6, causal_encoder=False, **options)
    assert [layer.kernel_size for layer in model.encoder] == [6, 3, 3]
    assert [layer.kernel_size for layer in model.decoder] == [3, 3, 3]
    assert [type(layer) for layer in (*model.encoder, *model.decoder)] == [CentredLayer] * 3 + [DecoderLayer] * 3
    for layer in (*model.encoder, *model.decoder):
        assert {name: getattr(layer, name) for name in options} == options


def test_nothing_is_hidden_in_the_module():
    model, source, target = make()
    before = set(model.__dict__)
    want = model(source, LENGTHS, target)
    model.step(target[:, 0], model.start(source, LENGTHS))
    assert set(model.__dict__) == before and not list(model.buffers())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(source, LENGTHS, target), want)


def test_the_state_of_chosen_sentences_continues_them():
    model, source, target = make()
    index = torch.tensor([2, 2, 0, 1])
    _, state, _ = model.step(target[:, 0], model.start(source, LENGTHS))
    want, *_ = model.step(target[:, 1], state)
    got, *_ = model.step(target[index, 1], pickle.loads(pickle.dumps(state.index_select(index))))
    torch.testing.assert_close(got, want[index])


def test_lengths_may_be_a_list_and_tokens_int32():
    model, source, target = make()
    assert torch.equal(model(source.int(), LENGTHS.tolist(), target.int()), model(source, LENGTHS, target))


def test_under_autocast():
    model, source, target = make(torch.float32)
    want, want_attention = model(source, LENGTHS, target, return_attention=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, attention = model(source, LENGTHS, target, return_attention=True)
        first, state, _ = model.step(target[:, 0], model.start(source, LENGTHS))
        second, *_ = model.step(target[:, 1], state)
        found = beam_search(model, source, LENGTHS, bos=BOS, eos=EOS, max_length=4)
    assert logits.dtype == torch.bfloat16 and attention.dtype == torch.float32
    torch.testing.assert_close(attention.sum(dim=2), torch.ones(3, 5))
    torch.testing.assert_close(attention, want_attention, rtol=0, atol=0.05)
    torch.testing.assert_close(logits.float(), want, rtol=0, atol=0.1)
    torch.testing.assert_close(torch.stack([first, second], dim=1), logits[:, :2], rtol=0, atol=0.1)
    assert len(found) == 3
    logits.float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_in_half_precision():
    model, source, target = make(torch.float32)
    want = model(source, LENGTHS, target)
    model = model.bfloat16()
    logits, attention = model(source, LENGTHS, target, return_attention=True)
    assert logits.dtype == torch.bfloat16 and attention.dtype == torch.float32
    torch.testing.assert_close(logits.float(), want, rtol=0, atol=0.1)
    first, *_ = model.step(target[:, 0], model.start(source, LENGTHS))
    torch.testing.assert_close(first, logits[:, 0], rtol=0, atol=0.1)


def test_compiles_without_a_graph_break():
    torch._dynamo.reset()
    model, source, target = make(num_layers=2, causal_encoder=False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    want = model(source, LENGTHS, target)
    got = compiled(source, LENGTHS, target)
    torch.testing.assert_close(got, want)
    got.sum().backward()
    got_gradient, model.w_k.weight.grad = model.w_k.weight.grad, None
    want.sum().backward()
    torch.testing.assert_close(got_gradient, model.w_k.weight.grad)


def test_it_learns_to_reverse():
    """Strings of 3 out of 5 letters: what comes out is what a search finds, token by token."""
    torch.manual_seed(0)
    letters = torch.cartesian_prod(*[torch.arange(2, 7)] * 3)  # (125, 3)
    ends = torch.full((len(letters), 1), EOS)
    wanted = torch.cat([letters.flip(1), ends], dim=1)
    target = torch.cat([torch.full_like(ends, BOS), letters.flip(1)], dim=1)
    lengths = torch.full((len(letters),), 3)
    model = QRNNSeq2Seq(7, 7, 8, 32, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(letters, lengths, target).flatten(0, 1), wanted.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for found in (
        beam_search(model, letters, lengths, bos=BOS, eos=EOS, beam_size=1, length_penalty=0.0, max_length=6),
        beam_search(model, letters, lengths, bos=BOS, eos=EOS, beam_size=3, max_length=6),
    ):
        right = [torch.equal(best.tokens, row[:3]) for best, row in zip(found, wanted, strict=True)]
        assert sum(right) >= 0.98 * len(right)


# --- search: a model whose distributions are arbitrary ----------------------------------------------------------------


class TableState(NamedTuple):
    sentence: torch.Tensor
    prefix: torch.Tensor

    def index_select(self, index):
        return TableState(self.sentence[index], self.prefix[index])


class TableModel(nn.Module):
    """Random logits for every prefix of every sentence: `table` (sentences, prefixes, V). A source is a sentence."""

    vocabulary = 4

    def __init__(self, sentences=5, max_length=4, seed=0, dtype=torch.float64):
        super().__init__()
        self.dropout = nn.Dropout(0.5)  # must be off in a search
        generator = torch.Generator().manual_seed(seed)
        prefixes = self.vocabulary ** (max_length + 1)
        table = 2 * torch.randn(sentences, prefixes, self.vocabulary, generator=generator, dtype=torch.float64)
        self.table = nn.Parameter(table.to(dtype))
        self.rows = []  # of each call of step

    def start(self, source, source_lengths):
        return TableState(source[:, 0], torch.zeros_like(source[:, 0]))

    def step(self, tokens, state):
        assert not torch.is_grad_enabled()
        self.rows.append(len(tokens))
        state = TableState(state.sentence, state.prefix * self.vocabulary + tokens)  # BOS = 0 leaves the first 0
        return self.dropout(self.table[state.sentence, state.prefix]), state, None

    def log_p(self, sentence, prefix):
        """Log-probabilities of what follows a prefix without bos."""
        number = 0
        for token in prefix:
            number = number * self.vocabulary + token
        return self.table[sentence, number].log_softmax(0).tolist()

    def search(self, sentences=None, **options):
        source = torch.arange(len(self.table)).unsqueeze(1) if sentences is None else torch.tensor(sentences)[:, None]
        return beam_search(self, source, torch.ones(len(source), dtype=torch.long), bos=BOS, eos=EOS, **options)


def normalised(log_p, length, alpha):
    return log_p / ((5 + length) / 6) ** alpha


def every_hypothesis(model, sentence, max_length):
    """All targets of at most `max_length` tokens and the log-probability of each, with eos."""
    others = [token for token in range(model.vocabulary) if token != EOS]
    for length in range(max_length + 1):
        for tokens in itertools.product(others, repeat=length):
            path = (*tokens, EOS)
            yield tokens, sum(model.log_p(sentence, path[:n])[token] for n, token in enumerate(path))


def plain_beam_search(model, sentence, beam_size, alpha, max_length):
    """One sentence, lists and tuples, and no early end. Returns the best (score, tokens)."""
    live, ended = [(0.0, ())], []
    for step in range(max_length + 1):
        candidates = []
        for total, tokens in live:
            for token, log_p in enumerate(model.log_p(sentence, tokens)):
                if token == EOS or step < max_length:
                    candidates.append((total + log_p, (*tokens, token)))
        candidates.sort(reverse=True)
        for total, tokens in candidates[:beam_size]:
            if tokens[-1] == EOS:
                ended.append((normalised(total, len(tokens), alpha), tokens[:-1]))
        live = [(total, tokens) for total, tokens in candidates if tokens[-1] != EOS][:beam_size]
    return max(ended)


@pytest.mark.parametrize("alpha", (0.0, 0.6, 1.0, 4.0))
def test_a_wide_beam_search_finds_the_best_of_all_targets(alpha):
    model = TableModel(max_length=3)
    found = model.search(beam_size=128, length_penalty=alpha, max_length=3)
    lengths = set()
    for sentence, best in enumerate(found):
        score, tokens = max(
            (normalised(log_p, len(tokens) + 1, alpha), tokens)
            for tokens, log_p in every_hypothesis(model, sentence, 3)
        )
        assert tuple(best.tokens.tolist()) == tokens
        assert best.score == pytest.approx(score, rel=1e-12)
        assert best.tokens.dtype == torch.int64 and best.attention is None
        lengths.add(len(tokens))
    assert len(lengths) > 1  # the comparison was not of the trivial


@pytest.mark.parametrize("alpha", (0.0, 0.6, 2.0))
@pytest.mark.parametrize("beam_size", (1, 2, 3, 5))
def test_beam_search_is_a_plain_one_sentence_by_sentence(beam_size, alpha):
    model = TableModel(sentences=100, seed=2)
    with torch.no_grad():
        model.table[:, :, EOS] += 1  # several hypotheses of a sentence end at one step
    found = model.search(beam_size=beam_size, length_penalty=alpha, max_length=4)
    for sentence, best in enumerate(found):
        score, tokens = plain_beam_search(model, sentence, beam_size, alpha, 4)
        assert tuple(best.tokens.tolist()) == tokens
        assert best.score == pytest.approx(score, rel=1e-12)


def test_beam_and_penalty_matter():
    model = TableModel(sentences=30)

    def total(**options):
        return sum(best.score for best in model.search(max_length=4, **options))

    def tokens(**options):
        return sum(len(best.tokens) for best in model.search(max_length=4, **options))

    assert total(beam_size=4, length_penalty=0.0) > total(beam_size=1, length_penalty=0.0)
    assert tokens(beam_size=4, length_penalty=3.0) > tokens(beam_size=4, length_penalty=0.0)


def test_a_search_of_one_beam_without_a_penalty_is_greedy():
    model = TableModel(sentences=30)
    lengths = set()
    for sentence, found in enumerate(model.search(beam_size=1, length_penalty=0.0, max_length=4)):
        tokens, score = [], 0.0
        for step in range(5):
            log_p = model.log_p(sentence, tokens)
            token = EOS if step == 4 else max(range(4), key=log_p.__getitem__)
            score += log_p[token]
            if token == EOS:
                break
            tokens.append(token)
        assert found.tokens.tolist() == tokens
        assert found.score == pytest.approx(score, rel=1e-12)
        lengths.add(len(tokens))
    assert lengths == {0, 1, 2, 3, 4}


def test_eos_ends_a_target_and_max_length_forces_it():
    model = TableModel(sentences=2)
    with torch.no_grad():
        model.table[0, :, EOS] = 50  # ends at once
        model.table[1, :, EOS] = -50  # never wants to end
    for beam_size in (1, 8):
        first, second = model.search(beam_size=beam_size, max_length=3)
        assert first.tokens.tolist() == [] and first.score == pytest.approx(0, abs=1e-12)
        assert len(second.tokens) == 3 and EOS not in second.tokens
        assert second.score < -10  # the end that was forced counts


def test_one_step_a_position_and_finished_sentences_leave():
    model = TableModel(sentences=3)
    with torch.no_grad():
        model.table[:, :, EOS] = -50
        model.table[0, :, EOS] = 50
        model.table[2, 4:, EOS] = 50  # after a token that is not 0: prefixes of two and more
        model.table[2, 0, 2] = 50
    model.search(beam_size=2, max_length=4)
    assert model.rows[0] == 6  # 3 sentences of 2 beams
    assert model.rows[1] == 4 and model.rows[-1] == 2
    assert len(model.rows) == 5  # 4 tokens and the forced eos

    model.rows.clear()
    model.search(sentences=[0, 0], beam_size=2, max_length=4)
    assert model.rows == [4]  # nothing is left to go on with


def test_a_search_of_no_sentences_finds_none():
    model, source, _ = make()
    assert beam_search(model, source[:0], LENGTHS[:0], bos=BOS, eos=EOS, max_length=4) == []


def test_a_beam_wider_than_the_vocabulary():
    model = TableModel(sentences=2)
    found = model.search(beam_size=50, max_length=1)
    for sentence, best in enumerate(found):
        score, tokens = plain_beam_search(model, sentence, 50, 0.6, 1)
        assert (tuple(best.tokens.tolist()), best.score) == (tokens, pytest.approx(score))


class LineModel(nn.Module):
    """Gives the same float32 log-probabilities after every prefix."""

    def __init__(self, *log_p):
        super().__init__()
        self.register_buffer("log_p", torch.tensor(log_p))

    def start(self, source, lengths):
        return TableState(source[:, 0], torch.zeros(len(source), dtype=torch.long))

    def step(self, tokens, state):
        return self.log_p.expand(len(tokens), -1), state, None


@pytest.mark.parametrize("alpha", (50.0, 100.0, 300.0))
def test_a_large_length_penalty_ranks_as_any_other(alpha):
    """Targets of eos and of one other token: all the weight is on length, and the longest is best."""
    model = LineModel(0.5, 0.5, -0.5)
    (found,) = beam_search(
        model, torch.zeros(1, 1, dtype=torch.long), [1], bos=BOS, eos=1, length_penalty=alpha, max_length=20
    )
    assert len(found.tokens) == 20 and set(found.tokens.tolist()) == {0}
    log_p = model.log_p.double().log_softmax(0)[0].item()
    assert found.score == pytest.approx(normalised(21 * log_p, 21, alpha), rel=1e-5)


def test_a_target_vocabulary_of_one_token_is_refused():
    with pytest.raises(ValueError, match="model: logits of 1 token given, 2 or more expected"):
        beam_search(LineModel(0.0), torch.zeros(1, 1, dtype=torch.long), [1], bos=0, eos=0, max_length=4)


# --- search: with the model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("beam_size", "alpha"), ((1, 0.0), (3, 0.6), (4, 2.0)))
def test_score_and_attention_are_those_of_the_forward_pass(beam_size, alpha):
    model, source, _ = make()
    found = beam_search(
        model, source, LENGTHS, bos=BOS, eos=EOS, beam_size=beam_size, length_penalty=alpha, max_length=6
    )
    for row, (tokens, score, attention) in enumerate(found):
        path = torch.tensor([BOS, *tokens.tolist(), EOS])
        logits, want_attention = model(
            source[row : row + 1], LENGTHS[row : row + 1], path[None, :-1], return_attention=True
        )
        log_p = logits[0].log_softmax(1).gather(1, path[1:, None]).sum().item()
        assert score == pytest.approx(normalised(log_p, len(tokens) + 1, alpha), rel=1e-10)
        torch.testing.assert_close(attention, want_attention[0, :, : LENGTHS[row]])
        assert attention.shape == (len(tokens) + 1, LENGTHS[row])


def test_sentences_of_a_batch_do_not_meet():
    model, source, _ = make()
    options = {"bos": BOS, "eos": EOS, "beam_size": 3, "max_length": 6}
    together = beam_search(model, source, LENGTHS, **options)
    for row, (tokens, score, attention) in enumerate(together):
        (alone,) = beam_search(model, source[row : row + 1], LENGTHS[row : row + 1], **options)
        assert torch.equal(alone.tokens, tokens) and alone.score == pytest.approx(score)
        torch.testing.assert_close(alone.attention, attention)


def test_a_search_leaves_the_model_as_it_was():
    model = TableModel()
    model.add_module("frozen", nn.Dropout(0.5).eval())
    first = model.search(max_length=4)
    assert model.training and model.dropout.training and not model.frozen.training
    assert [best.score for best in first] == [best.score for best in model.search(max_length=4)]  # no dropout
    with pytest.raises(ValueError, match="eos: 9 given"):
        beam_search(model, torch.zeros(1, 1, dtype=torch.long), [1], bos=BOS, eos=9, max_length=4)
    assert model.training and torch.is_grad_enabled()


# --- errors -----------------------------------------------------------------------------------------------------------

MODEL, SOURCE, TARGET = make(torch.float32, num_layers=1)


def build(**options):
    return QRNNSeq2Seq(**{"source_vocabulary": 9, "target_vocabulary": 7, **options})


def search(**options):
    beam_search(MODEL, SOURCE, LENGTHS, **{"bos": BOS, "eos": EOS, "max_length": 4, **options})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    (
        (
            lambda: build(mode="f"),
            ValueError,
            "mode: 'f' given",
        ),
        (lambda: build(mode="of"), ValueError, "mode: 'of' given"),
        (lambda: build(source_vocabulary=0), ValueError, "source_vocabulary: 0 given"),
        (lambda: build(target_vocabulary=2.5), TypeError, "target_vocabulary: 2.5 given"),
        (lambda: build(embedding_size=0), ValueError, "embedding_size: 0 given"),
        (lambda: build(hidden_size=0), ValueError, "hidden_size: 0 given"),
        (lambda: build(num_layers=0), ValueError, "num_layers: 0 given"),
        (lambda: build(kernel_size=0), ValueError, "kernel_size: 0 given"),
        (lambda: build(first_kernel_size=0), ValueError, "first_kernel_size: 0 given"),
        (lambda: build(dropout=1.5), ValueError, "dropout: 1.5 given"),
        (lambda: build(zoneout=-1), ValueError, "zoneout: -1 given"),
        (lambda: build(causal_encoder="no"), TypeError, "causal_encoder: 'no' given"),
        (lambda: build(dtype=torch.complex64), ValueError, "dtype: torch.complex64 given"),
        (lambda: build(activation="gelu"), ValueError, "activation: 'gelu' given"),
        (lambda: MODEL(SOURCE[0], LENGTHS, TARGET), ShapeError, r"source: shape \(6,\) given"),
        (
            lambda: MODEL(SOURCE, LENGTHS[:2], TARGET),
            ValueError,
            "source_lengths: .* given",
        ),
        (lambda: MODEL(SOURCE, LENGTHS, TARGET[0]), ShapeError, r"target: shape \(5,\) given"),
        (lambda: MODEL(SOURCE, LENGTHS, TARGET[:2]), ShapeError, r"target: shape \(2, 5\) given"),
        (lambda: MODEL(SOURCE.float(), LENGTHS, TARGET), ValueError, "source: dtype torch.float32 given"),
        (lambda: MODEL(SOURCE, LENGTHS / 2, TARGET), ValueError, "source_lengths: .* given"),
        (lambda: MODEL(SOURCE, LENGTHS, TARGET > 3), ValueError, "target: dtype torch.bool given"),
        (lambda: MODEL(SOURCE + 9, LENGTHS, TARGET), ValueError, r"source: \d+ given"),
        (lambda: MODEL(SOURCE, LENGTHS, TARGET - 7), ValueError, r"target: -\d+ given"),
        (lambda: MODEL(SOURCE, [6, 0, 4], TARGET), ValueError, r"source_lengths: .* given"),
        (lambda: MODEL(SOURCE, [6, 7, 4], TARGET), ValueError, r"source_lengths: .* given"),
        (
            lambda: MODEL.step(TARGET[:2, 0], MODEL.start(SOURCE, LENGTHS)),
            ShapeError,
            r"tokens: shape \(2,\) given",
        ),
        (lambda: search(beam_size=0), ValueError, "beam_size: 0 given"),
        (lambda: search(max_length=0), ValueError, "max_length: 0 given"),
        (lambda: search(max_length=2.5), TypeError, "max_length: 2.5 given"),
        (
            lambda: search(length_penalty=-0.5),
            ValueError,
            "length_penalty: -0.5 given",
        ),
        (lambda: search(length_penalty=math.nan), ValueError, "length_penalty: nan given"),
        (lambda: search(eos=7), ValueError, "eos: 7 given"),
        (lambda: search(eos=-1), ValueError, "eos: -1 given"),
        (lambda: search(bos=7), ValueError, "bos: 7 given"),
    ),
)
def test_errors_say_what_was_given_and_expected(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_model_that_gives_nan_is_an_error_and_no_empty_sentence():
    model = TableModel()
    with torch.no_grad():
        model.table[3] = math.nan
    with pytest.raises(ValueError, match="no target of finite probability for sentence 3"):
        model.search(max_length=4)
