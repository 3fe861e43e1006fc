"""A language that nobody has written before: a grammar and a lexicon drawn from a seed.

No model can have read it, so whatever a model translates it has learned here. The grammar is
small but asks for more than looking words up:

- the order of subject, object and verb is drawn (never that of English), as is the place of
  adjectives, of the negation and of the phrase that says where;
- every noun belongs to one of three classes. Adjectives agree with their noun in class and number
  (suffix), verbs with their subject (prefix), and no word shows a noun's class by itself;
- nouns take suffixes, in this order: plural, then object case or place ("in", "near");
- verbs take a suffix of tense; there are no articles, and "not" is a word of its own.

Stems are consonant-vowel-consonant-vowel-consonant, suffixes vowel-consonant, prefixes
consonant-vowel, so that every word has one reading only. Sounds, stems and affixes are drawn;
letters are English ones.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Sequence

NOUNS: tuple[tuple[str, str], ...] = (
    ("woman", "women"), ("man", "men"), ("child", "children"), ("teacher", "teachers"),
    ("hunter", "hunters"), ("farmer", "farmers"), ("singer", "singers"), ("king", "kings"),
    ("dog", "dogs"), ("goat", "goats"), ("horse", "horses"), ("mouse", "mice"),
    ("fish", "fishes"), ("wolf", "wolves"), ("bird", "birds"), ("snake", "snakes"),
    ("stone", "stones"), ("boat", "boats"), ("basket", "baskets"), ("knife", "knives"),
    ("drum", "drums"), ("apple", "apples"), ("rope", "ropes"), ("lamp", "lamps"),
)  # fmt: skip
"""Singular and plural."""
PLACES = ("forest", "village", "river", "house", "garden", "mountain")
ADJECTIVES = (
    "old",
    "small",
    "red",
    "clever",
    "hungry",
    "strong",
    "quiet",
    "heavy",
    "happy",
    "tall",
)
TRANSITIVE: tuple[tuple[str, str, str], ...] = (
    ("see", "sees", "saw"), ("carry", "carries", "carried"), ("find", "finds", "found"),
    ("hide", "hides", "hid"), ("bring", "brings", "brought"), ("wash", "washes", "washed"),
    ("follow", "follows", "followed"), ("choose", "chooses", "chose"),
    ("sell", "sells", "sold"), ("break", "breaks", "broke"), ("touch", "touches", "touched"),
    ("forget", "forgets", "forgot"),
)  # fmt: skip
"""Base form, third person, past."""
INTRANSITIVE: tuple[tuple[str, str, str], ...] = (
    ("sleep", "sleeps", "slept"), ("fall", "falls", "fell"), ("wait", "waits", "waited"),
    ("laugh", "laughs", "laughed"), ("swim", "swims", "swam"), ("return", "returns", "returned"),
)  # fmt: skip
TENSES = ("past", "present", "future")
RELATIONS = ("in", "near")
CLASSES = (0, 1, 2)
ORDERS = ("SOV", "OSV", "OVS", "VSO", "VOS")
CONSONANTS, VOWELS = "bdfghjklmnprstvz", "aeiou"

_PLURALS = dict(NOUNS)
_VERBS = {forms[0]: forms for forms in (*TRANSITIVE, *INTRANSITIVE)}


@dataclasses.dataclass(frozen=True)
class Phrase:
    """A noun with what belongs to it: "the old women"."""

    noun: str
    plural: bool = False
    adjective: str | None = None

    def words(self) -> tuple[str, ...]:
        """Its English stems."""
        return (self.noun,) if self.adjective is None else (self.noun, self.adjective)


@dataclasses.dataclass(frozen=True)
class Meaning:
    """What a sentence says.

    Attributes:
        subject: who.
        verb: base form of the English verb.
        object: whom or what; None for verbs that have none.
        tense: one of `TENSES`.
        negated: it is not so.
        place: (one of `RELATIONS`, one of `PLACES`), or None.
    """

    subject: Phrase
    verb: str
    object: Phrase | None = None
    tense: str = "present"
    negated: bool = False
    place: tuple[str, str] | None = None

    def words(self) -> set[str]:
        """Its English stems."""
        found = {*self.subject.words(), self.verb}
        if self.object is not None:
            found |= set(self.object.words())
        return found | ({self.place[1]} if self.place else set())


def english(meaning: Meaning) -> str:
    """The meaning in English.

    Example:
        >>> who, what = Phrase("woman", True, "old"), Phrase("dog")
        >>> english(Meaning(who, "see", what, "past", negated=True, place=("near", "river")))
        'The old women did not see the dog near the river.'
    """
    base, third, past = _VERBS[meaning.verb]
    plural = meaning.subject.plural
    if meaning.tense == "future":
        verb = f"will not {base}" if meaning.negated else f"will {base}"
    elif meaning.negated:
        helper = "did" if meaning.tense == "past" else "do" if plural else "does"
        verb = f"{helper} not {base}"
    else:
        verb = past if meaning.tense == "past" else base if plural else third
    parts = [_noun_phrase(meaning.subject), verb]
    if meaning.object is not None:
        parts.append(_noun_phrase(meaning.object))
    if meaning.place is not None:
        parts.append(f"{meaning.place[0]} the {meaning.place[1]}")
    sentence = " ".join(parts)
    return sentence[0].upper() + sentence[1:] + "."


def _noun_phrase(phrase: Phrase) -> str:
    noun = _PLURALS[phrase.noun] if phrase.plural else phrase.noun
    return " ".join(["the", *([phrase.adjective] if phrase.adjective else []), noun])


class InventedLanguage:
    """The language of a seed.

    Attributes:
        name: what it is called.
        order: of subject, verb and object.
        adjective_first, negation_first, place_first: whether they come before the noun, the verb,
            the whole sentence.
        stems: English word -> stem; ``"not"`` is among them.
        classes: noun -> class.
        suffixes: what -> suffix: ``"plural"``, ``"object"``, a relation, a tense, or an adjective's
            ``(class, plural)``.
        prefixes: ``(class, plural)`` of the subject -> prefix of the verb.

    Example:
        >>> language = InventedLanguage(seed=0)
        >>> language.write(Meaning(Phrase("dog"), "sleep")) == InventedLanguage(0).write(
        ...     Meaning(Phrase("dog"), "sleep"))
        True
    """

    def __init__(self, seed: int = 0) -> None:
        draw = random.Random(seed)
        consonants = draw.sample(CONSONANTS, 11)
        vowels = draw.sample(VOWELS, 4)
        stems = [
            "".join(letters)
            for letters in itertools.product(consonants, vowels, consonants, vowels, consonants)
        ]
        words = [n for n, _ in NOUNS] + [*PLACES, *ADJECTIVES, *_VERBS, "not"]
        chosen = draw.sample(stems, len(words) + 1)
        self.stems = dict(zip(words, chosen, strict=False))
        self.name = chosen[-1].capitalize()
        self.classes = {noun: draw.choice(CLASSES) for noun, _ in NOUNS}
        agreement = tuple(itertools.product(CLASSES, (False, True)))
        suffixes = ["".join(p) for p in itertools.product(vowels, consonants)]
        marked = ("plural", "object", *RELATIONS, *TENSES, *agreement)
        self.suffixes: dict[object, str] = dict(
            zip(marked, draw.sample(suffixes, len(marked)), strict=True)
        )
        prefixes = ["".join(p) for p in itertools.product(consonants, vowels)]
        self.prefixes = dict(zip(agreement, draw.sample(prefixes, len(agreement)), strict=True))
        self.order = draw.choice(ORDERS)
        self.adjective_first, self.negation_first, self.place_first = (
            draw.random() < 0.5 for _ in range(3)
        )

    def write(self, meaning: Meaning) -> str:
        """The meaning in this language."""
        agreed = (self.classes[meaning.subject.noun], meaning.subject.plural)
        verb = self.prefixes[agreed] + self.stems[meaning.verb] + self.suffixes[meaning.tense]
        parts = {
            "S": self._phrase(meaning.subject),
            "V": self._ordered(verb, self.stems["not"] if meaning.negated else "",
                               self.negation_first),
            "O": "" if meaning.object is None else self._phrase(meaning.object, "object"),
        }  # fmt: skip
        sentence = " ".join(parts[role] for role in self.order if parts[role])
        place = ""
        if meaning.place is not None:
            place = self.stems[meaning.place[1]] + self.suffixes[meaning.place[0]]
        sentence = self._ordered(sentence, place, self.place_first)
        return sentence[0].upper() + sentence[1:] + "."

    def _phrase(self, phrase: Phrase, case: str | None = None) -> str:
        noun = self.stems[phrase.noun]
        noun += self.suffixes["plural"] if phrase.plural else ""
        noun += self.suffixes[case] if case else ""
        adjective = ""
        if phrase.adjective is not None:
            agreed = (self.classes[phrase.noun], phrase.plural)
            adjective = self.stems[phrase.adjective] + self.suffixes[agreed]
        return self._ordered(noun, adjective, self.adjective_first)

    @staticmethod
    def _ordered(head: str, other: str, first: bool) -> str:
        return " ".join(p for p in ((other, head) if first else (head, other)) if p)

    def lexicon(self) -> list[tuple[str, str]]:
        """Stems and what they mean."""
        return [(stem, word) for word, stem in self.stems.items()]


def draw_meaning(draw: random.Random) -> Meaning:
    """A random meaning."""

    def phrase() -> Phrase:
        adjective = draw.choice(ADJECTIVES) if draw.random() < 0.5 else None
        return Phrase(draw.choice(NOUNS)[0], draw.random() < 0.4, adjective)

    verb = draw.choice(tuple(_VERBS))
    has_object = any(verb == forms[0] for forms in TRANSITIVE)
    return Meaning(
        phrase(),
        verb,
        phrase() if has_object else None,
        draw.choice(TENSES),
        draw.random() < 0.25,
        (draw.choice(RELATIONS), draw.choice(PLACES)) if draw.random() < 0.3 else None,
    )


def split(train: int, test: int, seed: int = 0) -> tuple[list[Meaning], list[Meaning]]:
    """Different meanings to learn from and to be tested with.

    Every word of a test meaning is in some training meaning; the meaning itself is in none. Test
    meanings are drawn from a sequence of their own: they stay, as far as their words were read,
    when ``train`` changes.

    Raises:
        ValueError: less than one of either, or too few training sentences to know the words of
            ``test`` sentences.
    """
    if train < 1 or test < 1:
        raise ValueError(f"train and test must be 1 or more, got {train} and {test}")
    learned = _distinct(train, random.Random(f"train {seed}"))
    known: set[str] = set().union(*(m.words() for m in learned))
    seen = set(learned)
    draw = random.Random(f"test {seed}")
    asked: list[Meaning] = []
    for _ in range(200 * test + 1000):
        meaning = draw_meaning(draw)
        if meaning not in seen and meaning.words() <= known:
            seen.add(meaning)
            asked.append(meaning)
            if len(asked) == test:
                return learned, asked
    raise ValueError(f"{train} training sentences have too few words for {test} others; use more")


def _distinct(count: int, draw: random.Random) -> list[Meaning]:
    found: dict[Meaning, None] = {}
    while len(found) < count:
        found[draw_meaning(draw)] = None
    return list(found)


def sentences(language: InventedLanguage, meanings: Sequence[Meaning]) -> list[tuple[str, str]]:
    """(sentence, English) of meanings."""
    return [(language.write(m), english(m)) for m in meanings]
