"""The synthetic language: its probabilities are exact, and the best perplexity takes memory but no look ahead."""

import math
from collections import Counter
from itertools import pairwise

import pytest

from lab import synthetic
from lab.synthetic import EOS, next_word_probabilities, perplexity_floor, sample_sentences

SENTENCES = sample_sentences(13_000, seed=3)
TRAIN, TEST = SENTENCES[:12_000], SENTENCES[12_000:]


def steps(sentences):
    """(prefix, next word) for every word and EOS."""
    for sentence in sentences:
        tokens = [*sentence, EOS]
        for t, word in enumerate(tokens):
            yield tokens[:t], word


def perplexity(probabilities):
    return math.exp(-sum(map(math.log, probabilities)) / len(probabilities))


def test_sentences_are_a_function_of_the_seed():
    assert sample_sentences(20, seed=3) == SENTENCES[:20]
    assert sample_sentences(20, seed=4) != SENTENCES[:20]
    assert {8, 31} >= {min(map(len, SENTENCES)), max(map(len, SENTENCES))}
    assert all(sentence[0] == sentence[-1] for sentence in SENTENCES)


def test_vocabulary():
    classes = {tuple(words) for words, _ in synthetic.GRAMMAR.values()}
    words = [word for words in classes for word in words]
    assert len(words) == len(set(words))  # the place of a word in a sentence is certain
    assert 100 <= len(words) <= 300
    assert {word for sentence in SENTENCES for word in sentence} | {EOS} == set(words)


def test_probabilities_sum_to_one_and_multiply_to_the_floor():
    probabilities = []
    for prefix, word in steps(TEST[:200]):
        distribution = next_word_probabilities(prefix)
        assert sum(distribution.values()) == pytest.approx(1, abs=1e-12)
        probabilities.append(distribution[word])
    assert perplexity(probabilities) == pytest.approx(perplexity_floor(TEST[:200]), rel=1e-12)


def test_probabilities_are_the_frequencies_of_samples():
    """Of each word, and of the predictions of each size: counts within 5 standard deviations of what was predicted."""
    expected, variance, seen = Counter(), Counter(), Counter()
    for prefix, word in steps(TRAIN[:4000]):
        for candidate, p in next_word_probabilities(prefix).items():
            for event in (candidate, math.floor(20 * p)):
                expected[event] += p
                variance[event] += p * (1 - p)
                seen[event] += candidate == word
    for event in expected:
        assert abs(seen[event] - expected[event]) <= 5 * math.sqrt(variance[event]) + 1e-6, event


@pytest.mark.parametrize("remembers_all", (True, False))
def test_the_topic_lasts_the_sentence(remembers_all):
    """Verbs of each topic after a first noun of each topic, in later clauses: as predicted, unless the first clause is
    forgotten."""

    def topic_of(word, words):
        return words.index(word) * len(synthetic.TOPICS) // len(words)

    expected, variance, seen = Counter(), Counter(), Counter()
    for prefix, word in steps(TRAIN[:4000]):
        links = [t for t, w in enumerate(prefix) if w in synthetic.LINKS]
        if not links or word not in synthetic.VERBS:
            continue
        first = topic_of(next(w for w in prefix if w in synthetic.NOUNS), synthetic.NOUNS)
        memory = prefix if remembers_all else [*prefix[:2], *prefix[links[-1] + 1 :]]
        predicted = Counter()
        for candidate, p in next_word_probabilities(memory).items():
            predicted[first, topic_of(candidate, synthetic.VERBS)] += p
        expected.update(predicted)
        variance.update({event: p * (1 - p) for event, p in predicted.items()})
        seen[first, topic_of(word, synthetic.VERBS)] += 1
    assert len(expected) == len(synthetic.TOPICS) ** 2
    deviation = max(abs(seen[event] - expected[event]) / math.sqrt(variance[event]) for event in expected)
    assert (deviation < 5) == remembers_all


def test_a_bigram_model_misses_the_topic_and_the_recalled_word():
    counts = Counter()
    for sentence in TRAIN:
        tokens = [EOS, *sentence, EOS]
        counts.update(pairwise(tokens))
        counts.update(tokens[:-1])
    smoothing, types = 0.1, len({word for sentence in TRAIN for word in sentence}) + 1
    bigram, exact, at_recall = [], [], []
    for prefix, word in steps(TEST):
        last = prefix[-1] if prefix else EOS
        bigram.append((counts[last, word] + smoothing) / (counts[last] + smoothing * types))
        exact.append(next_word_probabilities(prefix)[word])
        at_recall.append(last == "says")
    assert perplexity(bigram) > 1.1 * perplexity_floor(TEST)
    recalled = [(p, q) for p, q, here in zip(bigram, exact, at_recall, strict=True) if here]
    others = [(p, q) for p, q, here in zip(bigram, exact, at_recall, strict=True) if not here]
    assert perplexity([p for p, _ in recalled]) > 5 and perplexity([q for _, q in recalled]) == pytest.approx(1)
    assert perplexity([p for p, _ in others]) > 1.1 * perplexity([q for _, q in others])


def test_a_predictor_that_sees_one_word_of_the_future_is_below_the_floor():
    """It is told the word after the one that it predicts, and makes the best of that (Bayes)."""
    sentences, probabilities = TEST[:60], []
    for sentence in sentences:
        tokens = [*sentence, EOS]
        for t, word in enumerate(tokens):
            prefix, joint = tokens[:t], next_word_probabilities(tokens[:t])
            if word != EOS:
                peek = tokens[t + 1]
                joint = {w: p * next_word_probabilities([*prefix, w]).get(peek, 0) for w, p in joint.items()}
            probabilities.append(joint[word] / sum(joint.values()))
    assert perplexity(probabilities) < 0.95 * perplexity_floor(sentences)


@pytest.mark.parametrize("prefix", (["boat"], ["anna", ":", "anna"], [*TEST[0][:-1], "nobody"]))
def test_what_begins_no_sentence_is_refused(prefix):
    with pytest.raises(ValueError, match=prefix[-1]):
        next_word_probabilities(prefix)
