"""What programs do with nn.LSTM and nn.GRU, one habit a test, each in a small client of its own, and so with QRNN."""

import io
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from qrnn import QRNN

RNNS = {
    "LSTM": nn.LSTM,
    "GRU": nn.GRU,
    "QRNN": QRNN,
    "QRNN-f": partial(QRNN, mode="f"),  # its state is one tensor, as that of nn.GRU
    "QRNN-ifo": partial(QRNN, mode="ifo", activation="tanh"),
}
WITH_WINDOWS = {"QRNN-windows": partial(QRNN, kernel_size=3, first_kernel_size=2, dense=True)}
every_rnn = pytest.mark.parametrize("rnn_class", RNNS.values(), ids=RNNS)
every_rnn_and_windows = pytest.mark.parametrize("rnn_class", (RNNS | WITH_WINDOWS).values(), ids=RNNS | WITH_WINDOWS)
every_direction = pytest.mark.parametrize("bidirectional", (False, True), ids=("forward", "both directions"))


def build(model_class, *args, **kwargs):
    torch.manual_seed(0)
    return model_class(*args, **kwargs).double()


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def each(function, state):
    """The state of nn.LSTM or of nn.GRU, with the function applied to its tensors."""
    return function(state) if isinstance(state, torch.Tensor) else tuple(function(part) for part in state)


def last_output(state):
    """h_n."""
    return state if isinstance(state, torch.Tensor) else state[0]


# --- language models -------------------------------------------------------------------------------------------------


class WordModel(nn.Module):
    """Predict the next word, time first, with a state of zeros that the program makes itself."""

    def __init__(self, rnn_class, words=12, features=16, hidden=24, layers=2):
        super().__init__()
        self.words, self.hidden, self.layers = words, hidden, layers
        self.embedding, self.decoder = nn.Embedding(words, features), nn.Linear(hidden, words)
        self.rnn = rnn_class(features, hidden, layers, dropout=0.1)

    def init_hidden(self, batch_size):
        zeros = next(self.parameters()).new_zeros(self.layers, batch_size, self.hidden)
        one = isinstance(self.rnn, nn.GRU) or getattr(self.rnn, "mode", "") == "f"
        return zeros if one else (zeros, zeros)

    def forward(self, words, hidden):
        output, hidden = self.rnn(self.embedding(words), hidden)
        return F.log_softmax(self.decoder(output).view(-1, self.words), dim=1), hidden


def repackage_hidden(hidden):
    """Cut the history, whatever tuples the state is made of."""
    return hidden.detach() if isinstance(hidden, torch.Tensor) else tuple(repackage_hidden(part) for part in hidden)


@every_rnn_and_windows
def test_a_language_model_learns_with_a_state_that_is_repackaged(rnn_class):
    torch.manual_seed(0)
    model = WordModel(rnn_class)
    text = torch.randint(12, (4, 15)).repeat(1, 40).T  # (T, B): each column repeats 15 words of its own
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    hidden, losses = model.init_hidden(4), []
    for start in range(0, 590, 10):  # pieces that do not end where the repetition does
        hidden = repackage_hidden(hidden)
        predicted, hidden = model(text[start : start + 10], hidden)
        loss = F.nll_loss(predicted, text[start + 1 : start + 11].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < losses[0] / 4


@every_rnn_and_windows
@torch.no_grad()
def test_a_text_that_is_generated_word_by_word_is_the_likeliest_to_the_model_as_a_whole(rnn_class):
    model = build(WordModel, rnn_class).eval()
    word, hidden, words, steps = torch.zeros(1, 1, dtype=torch.long), model.init_hidden(1), [], []
    for _ in range(20):
        words.append(word)
        predicted, hidden = model(word, hidden)
        steps.append(predicted)
        word = predicted.argmax(dim=1, keepdim=True)
    whole, _ = model(torch.cat(words), model.init_hidden(1))
    torch.testing.assert_close(torch.cat(steps), whole)


# --- sentence vectors ------------------------------------------------------------------------------------------------


class SentenceClassifier(nn.Module):
    """Judge a sentence by h_n[-1], with both directions by h_n[-2] and h_n[-1] side by side."""

    def __init__(self, rnn_class, bidirectional):
        super().__init__()
        self.bidirectional = bidirectional
        self.rnn = rnn_class(4, 6, 2, batch_first=True, bidirectional=bidirectional)
        self.classify = nn.Linear(12 if bidirectional else 6, 2)

    def forward(self, x, lengths=None):
        if lengths is not None:
            x = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        _, state = self.rnn(x)
        h_n = last_output(state)
        return self.classify(torch.cat((h_n[-2], h_n[-1]), dim=1) if self.bidirectional else h_n[-1])


@every_direction
@every_rnn_and_windows
def test_a_sentence_vector_does_not_see_padding_or_other_sentences(rnn_class, bidirectional):
    model, x, lengths = build(SentenceClassifier, rnn_class, bidirectional), draw(4, 9, 4), [3, 8, 1, 8]
    judged = model(x, lengths)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(judged[row : row + 1], model(x[row : row + 1, :length]))


@pytest.mark.parametrize("packed", (False, True))
@every_rnn_and_windows
def test_a_sentence_vector_is_the_output_at_the_last_word(rnn_class, packed):
    """Programs take either, and expect the same."""
    rnn, x = build(rnn_class, 4, 6, 2, batch_first=True), draw(4, 9, 4)
    lengths = torch.tensor([3, 8, 1, 9]) if packed else torch.full((4,), 9)
    output, state = rnn(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False) if packed else x)
    output = pad_packed_sequence(output, batch_first=True)[0] if packed else output
    last = (lengths - 1).view(-1, 1, 1).expand(-1, 1, 6)
    torch.testing.assert_close(last_output(state)[-1], output.gather(1, last).squeeze(1))


# --- initial states of one's own -------------------------------------------------------------------------------------


class LearnedStart(nn.Module):
    """Begin with a state that is a parameter, the same for every sequence of the batch."""

    def __init__(self, rnn_class, bidirectional):
        super().__init__()
        self.rnn = rnn_class(4, 6, 2, batch_first=True, bidirectional=bidirectional)
        like = last_output(self.rnn(torch.zeros(1, 1, 4))[1])
        two = isinstance(self.rnn(torch.zeros(1, 1, 4))[1], tuple)
        self.start = nn.ParameterList(torch.randn_like(like) for _ in range(1 + two))

    def forward(self, x):
        start = [part.expand(-1, len(x), -1).contiguous() for part in self.start]
        return self.rnn(x, tuple(start) if len(start) == 2 else start[0])


@every_direction
@every_rnn
def test_an_initial_state_is_learned(rnn_class, bidirectional):
    model, x = build(LearnedStart, rnn_class, bidirectional), draw(3, 2, 4)
    target = draw(3, 2, 12 if bidirectional else 6).sigmoid() / 2
    for parameter in model.rnn.parameters():
        parameter.requires_grad_(False)
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=0.1), []
    for _ in range(30):
        output, _ = model(x)
        loss = F.mse_loss(output, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] * 0.7
    assert all(part.grad.any() for part in model.start)


@every_rnn
def test_a_state_kept_batch_first_goes_in_as_it_is(rnn_class):
    """As replay buffers and nn.DataParallel keep it: (B, L * D, H), turned round on the way in."""
    rnn, x = build(rnn_class, 4, 6, 2), draw(5, 3, 4)
    _, state = rnn(x)
    kept = each(lambda part: part.transpose(0, 1).contiguous(), state)
    turned = each(lambda part: part.transpose(0, 1), kept)  # not contiguous
    torch.testing.assert_close(rnn(x, turned)[0], rnn(x, state)[0])


# --- policies --------------------------------------------------------------------------------------------------------


class Policy(nn.Module):
    """Act step by step; where an episode has just begun the state is multiplied by 0."""

    def __init__(self, rnn_class):
        super().__init__()
        self.rnn, self.act = rnn_class(4, 6, 2), nn.Linear(6, 3)

    def start(self, batch_size):
        return each(torch.zeros_like, self.rnn(torch.zeros(1, batch_size, 4, dtype=torch.float64))[1])

    def forward(self, observation, state, going_on):
        """(B, F), the state, (B,), which is 0 where an episode begins."""
        state = each(lambda part: part * going_on.view(1, -1, 1), state)
        output, state = self.rnn(observation.unsqueeze(0), state)
        return self.act(output.squeeze(0)), state


@every_rnn
def test_a_policy_acts_in_each_episode_as_if_it_were_the_only_one(rnn_class):
    policy, observations = build(Policy, rnn_class), draw(12, 2, 4)
    going_on = torch.ones(12, 2, dtype=torch.float64)
    going_on[5, 0] = going_on[3, 1] = going_on[9, 1] = 0
    actions, state = [], policy.start(2)
    for observation, mask in zip(observations, going_on, strict=True):
        action, state = policy(observation, state, mask)
        actions.append(action)
    actions = torch.stack(actions)
    for column, borders in enumerate(((0, 5, 12), (0, 3, 9, 12))):
        for begin, end in pairwise(borders):
            episode = observations[begin:end, column]
            torch.testing.assert_close(actions[begin:end, column], policy.act(policy.rnn(episode)[0]))


# --- encoders and decoders -------------------------------------------------------------------------------------------


class Translator(nn.Module):
    """Read in both directions, bridge their last states, then decode step by step with attention to all outputs."""

    def __init__(self, rnn_class):
        super().__init__()
        self.encoder = rnn_class(4, 3, 2, batch_first=True, bidirectional=True)
        self.decoder = rnn_class(5 + 6, 6, 2, batch_first=True)
        self.score = nn.Linear(6, 6, bias=False)

    def encode(self, source, lengths):
        packed = pack_padded_sequence(source, lengths, batch_first=True, enforce_sorted=False)
        memory, state = self.encoder(packed)
        memory, _ = pad_packed_sequence(memory, batch_first=True, total_length=source.shape[1])
        return memory, each(lambda part: torch.cat([part[0::2], part[1::2]], dim=2), state)  # directions side by side

    def forward(self, source, lengths, target):
        memory, state = self.encode(source, lengths)  # (B, S, 2H), (L, B, 2H)
        padding = torch.arange(source.shape[1]) >= torch.as_tensor(lengths).unsqueeze(1)
        outputs = []
        for step in target.unbind(dim=1):
            query = self.score(last_output(state)[-1]).unsqueeze(2)
            weights = (memory @ query).squeeze(2).masked_fill(padding, -torch.inf).softmax(dim=1)
            context = (weights.unsqueeze(1) @ memory).squeeze(1)
            output, state = self.decoder(torch.cat([step, context], dim=1).unsqueeze(1), state)
            outputs.append(output)
        return torch.cat(outputs, dim=1)


@every_rnn
def test_a_decoder_starts_from_the_encoders_state_and_attends_to_its_outputs(rnn_class):
    model, source, target, lengths = build(Translator, rnn_class), draw(4, 9, 4), draw(4, 5, 5), [3, 8, 1, 8]
    output = model(source, lengths, target)
    for row, length in enumerate(lengths):
        alone = model(source[row : row + 1, :length], [length], target[row : row + 1])
        torch.testing.assert_close(output[row], alone[0])
    output.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.any(), name


@every_rnn
def test_the_encoders_state_alone_tells_the_decoder_what_was_read(rnn_class):
    model, source = build(Translator, rnn_class), draw(2, 9, 4).requires_grad_()
    _, state = model.encode(source, [9, 9])
    model.decoder(torch.zeros(2, 1, 11, dtype=torch.float64), state)[0].sum().backward()
    assert source.grad.any(dim=2).all()


@every_rnn
def test_beams_are_copied_reordered_and_cut_by_the_usual_calls(rnn_class):
    rnn, x, order = build(rnn_class, 4, 6, 2), draw(7, 3, 4), torch.tensor([2, 2, 0])
    _, state = rnn(x[:5])
    want, _ = rnn(x[5:, order], each(lambda part: part[:, order], state))
    for reorder in (
        lambda part: part.index_select(1, order),
        lambda part: part.repeat_interleave(4, dim=1)[:, order * 4 + 1],
        lambda part: torch.cat([part[:, 2:], part[:, 2:], part[:, :1]], dim=1),
        lambda part: torch.stack(part.unbind(1), dim=1)[:, order].clone(),
    ):
        got, _ = rnn(x[5:, order], each(reorder, state))
        torch.testing.assert_close(got, want)


@every_rnn
def test_a_state_is_rebuilt_by_its_type(rnn_class):
    rnn, x = build(rnn_class, 4, 6, 2), draw(5, 3, 4)
    _, state = rnn(x)
    want, _ = rnn(x, state)
    if isinstance(state, tuple):
        assert torch.equal(rnn(x, type(state)(part.clone() for part in state))[0], want)
        assert torch.equal(rnn(x, type(state)(map(torch.Tensor.detach, state)))[0], want)
        assert torch.equal(rnn(x, list(state))[0], want)
    else:
        assert torch.equal(rnn(x, state.clone())[0], want)


# --- parameters and files --------------------------------------------------------------------------------------------


@every_rnn_and_windows
def test_model_and_state_are_loaded_as_weights_only(rnn_class):
    rnn, twin, x, file = build(rnn_class, 4, 6, 2), rnn_class(4, 6, 2).double(), draw(5, 3, 4), io.BytesIO()
    output, state = rnn(x)
    torch.save({"model": rnn.state_dict(), "state": repackage_hidden(state)}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    twin.load_state_dict(saved["model"])
    assert torch.equal(twin(x)[0], output)
    assert torch.equal(twin(x, saved["state"])[0], rnn(x, state)[0])


@every_rnn_and_windows
def test_an_initialiser_that_goes_by_weight_and_bias_reaches_all_parameters(rnn_class):
    rnn = build(rnn_class, 4, 6, 2)
    before = [[parameter.clone() for parameter in layer] for layer in rnn.all_weights]
    for name, parameter in rnn.named_parameters():
        if "bias" in name:
            nn.init.constant_(parameter, 0)
        elif "weight" in name:
            nn.init.orthogonal_(parameter)
    for layer, old_layer in zip(rnn.all_weights, before, strict=True):
        assert not any(torch.equal(parameter, old) for parameter, old in zip(layer, old_layer, strict=True))
    assert sum(map(len, before)) == len(list(rnn.parameters()))
