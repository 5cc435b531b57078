"""A small artificial language in which the best possible perplexity is known exactly.

    anna : the wet sailor drifts near a blue harbour while the crab sinks , says anna

A sentence has a topic, which is never written and makes some words likelier than others from its first to its last
word, and a local grammar; its last word is its first. So the next word depends on more than the word before it, and a
model that remembers nothing is far from the best. `next_word_probabilities` is exact: it sums over the topics what each
of them gives to the words so far. A model below `perplexity_floor`, on enough text, has seen the future.

Sentences are independent of each other; the language is fixed, a seed only chooses the sentences.
"""

from __future__ import annotations

import functools
import math
import random

EOS = "<eos>"  # ends every sentence

TOPICS = (  # nouns, verbs and adjectives that are most at home in each
    ("sailor boat harbour wave crab anchor", "drifts sinks floats sails", "wet blue salty windy"),
    ("farmer horse barn field goat plough", "grazes ploughs mows reaps", "muddy sturdy sunny rural"),
    ("cook oven soup onion spoon kettle", "simmers boils bakes fries", "spicy warm sweet fresh"),
    ("singer drum violin chorus stage melody", "plays sings echoes hums", "loud gentle solemn merry"),
    ("clerk tram market tower bridge square", "trades hurries builds queues", "busy grey narrow noisy"),
    ("hunter fox cave owl pine creek", "hides howls climbs roams", "wild dark mossy silent"),
)
NOUNS, VERBS, ADJECTIVES = (" ".join(words).split() for words in zip(*TOPICS, strict=True))
NAMES = ["anna", "boris", "clara", "david", "edith", "frank", "greta", "hugo"]
DETERMINERS, PREPOSITIONS, LINKS = ["the", "a"], ["near", "behind", "beside"], ["while", "and", "because"]

TOPIC_DECAY = 0.75  # how likely a word is over the one before it, from a topic's own first word round the whole class
MORE_CLAUSES = (0.6, 0.35, 0.0)  # probability of another clause after the first, second, third

# place in the sentence -> (the words that may stand there, the places that may follow and their probabilities);
# after a clause ("verb" without, "object" with an object) comes "link" or ","
GRAMMAR: dict[str, tuple[list[str], dict[str, float]]] = {
    "start": ([], {"name": 1}),
    "name": (NAMES, {":": 1}),
    ":": ([":"], {"determiner": 1}),
    "determiner": (DETERMINERS, {"adjective": 0.4, "noun": 0.6}),
    "adjective": (ADJECTIVES, {"noun": 1}),
    "noun": (NOUNS, {"verb": 1}),
    "verb": (VERBS, {"preposition": 0.4, "clause end": 0.6}),
    "preposition": (PREPOSITIONS, {"object determiner": 1}),
    "object determiner": (DETERMINERS, {"object adjective": 0.4, "object": 0.6}),
    "object adjective": (ADJECTIVES, {"object": 1}),
    "object": (NOUNS, {"clause end": 1}),
    "link": (LINKS, {"determiner": 1}),
    ",": ([","], {"says": 1}),
    "says": (["says"], {"recall": 1}),
    "recall": ([], {"end": 1}),  # the first word again
    "end": ([EOS], {}),
}


def _emissions(words: list[str]) -> dict[str, list[float]]:
    """Return word -> its probability in each topic, among the words of its class.

    Topics differ in the content words only.
    """
    if words not in (NOUNS, VERBS, ADJECTIVES):
        return {word: [1 / len(words)] * len(TOPICS) for word in words}
    size, per_topic = len(words), len(words) // len(TOPICS)
    norm = sum(TOPIC_DECAY**i for i in range(size))
    return {
        word: [TOPIC_DECAY ** ((i - topic * per_topic) % size) / norm for topic in range(len(TOPICS))]
        for i, word in enumerate(words)
    }


EMISSIONS = {place: _emissions(words) for place, (words, _) in GRAMMAR.items()}


@functools.cache
def _next_words(place: str, clause: int, first_word: str) -> dict[str, tuple[str, list[float]]]:
    """Return word -> (its place, its probability in each topic), for all words that can follow in clause 0, 1 or 2."""
    words: dict[str, tuple[str, list[float]]] = {}
    for following, probability in _following(place, clause).items():
        emissions = {first_word: [1.0] * len(TOPICS)} if following == "recall" else EMISSIONS[following]
        words |= {word: (following, [probability * e for e in given]) for word, given in emissions.items()}
    return words


def _following(place: str, clause: int) -> dict[str, float]:
    following = dict(GRAMMAR[place][1])
    clause_end = following.pop("clause end", 0)
    following |= {"link": clause_end * MORE_CLAUSES[clause], ",": clause_end * (1 - MORE_CLAUSES[clause])}
    return {name: probability for name, probability in following.items() if probability > 0}


def _read(prefix: list[str]) -> tuple[str, int, list[float]]:
    """Return the place and the clause of the last word, and for each topic the probability of it and the prefix."""
    place, clause, joint = "start", 0, [1 / len(TOPICS)] * len(TOPICS)
    for word in prefix:
        words = _next_words(place, clause, prefix[0])
        if word not in words:
            raise ValueError(f"prefix: {' '.join(prefix)!r} given, which begins no sentence of the synthetic language")
        place, emission = words[word]
        joint = [j * e for j, e in zip(joint, emission, strict=True)]
        clause += place == "link"
    return place, clause, joint


def next_word_probabilities(prefix: list[str]) -> dict[str, float]:
    """Return the exact distribution of the word after the words of a sentence so far.

    Args:
        prefix: the first words of a sentence; none, for the distribution of the first word.

    Returns:
        Every word that can follow, `EOS` among them, and its probability; they sum to 1 (no word after `EOS`: empty).

    Raises:
        ValueError: if no sentence of the language begins like that.
    """
    place, clause, joint = _read(prefix)
    words, total = _next_words(place, clause, prefix[0] if prefix else ""), sum(joint)
    return {
        word: sum(j * e for j, e in zip(joint, emission, strict=True)) / total for word, (_, emission) in words.items()
    }


def perplexity_floor(sentences: list[list[str]]) -> float:
    """Return the lowest perplexity to be expected on these sentences (without `EOS`) without sight of the future.

    By the chain rule the product of `next_word_probabilities` over a sentence and its `EOS` is the sentence's
    probability, which is a sum over the topics.
    """
    log_likelihood = sum(math.log(sum(_read([*sentence, EOS])[2])) for sentence in sentences)
    return math.exp(-log_likelihood / sum(len(sentence) + 1 for sentence in sentences))


def sample_sentences(count: int, seed: int = 0) -> list[list[str]]:
    """Return `count` independent sentences of 8 to 31 words, without `EOS`; the same for the same seed."""
    rng = random.Random(seed)
    return [_sample_sentence(rng) for _ in range(count)]


def _sample_sentence(rng: random.Random) -> list[str]:
    topic, place, clause = rng.randrange(len(TOPICS)), "start", 0
    sentence: list[str] = []
    while True:
        words = _next_words(place, clause, sentence[0] if sentence else "")
        (word,) = rng.choices(list(words), [emission[topic] for _, emission in words.values()])
        if word == EOS:
            return sentence
        place = words[word][0]
        clause += place == "link"
        sentence.append(word)
