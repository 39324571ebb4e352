"""The toy language of the demo: seeded generators of the base's pretraining text and of the task's examples.

The pretraining text is short English stories about people who pass things on, followed by questions, answers and
remarks that recall the story, so that a small model learns to read facts off its context. The task turns such a
story into a one-line record whose `key: value` fields never occur in the pretraining text (`RECORD_FIELD` is the
proof). Everything follows from a seed, through `random.Random` and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random


def _words(line: str) -> tuple[str, ...]:
    return tuple(line.split())


WOMEN = _words("Anna Bella Carla Diana Emma Flora Greta Hanna Irma Julia Karin Laura Maria Nora Olga Paula")
MEN = _words("Adam Bruno Carl David Erik Felix George Henry Ivan Jacob Kevin Leo Martin Noah Oscar Peter")
NAMES = WOMEN + MEN
THINGS = _words(
    "lamps chairs books cups plates spoons coats hats shoes gloves apples pears plums lemons onions carrots tables "
    "clocks boats kites drums flutes pens candles baskets bottles boxes buttons ribbons blankets pillows keys"
)
PLACES = _words(
    "Oslo Rome Paris London Berlin Madrid Lisbon Vienna Prague Warsaw Athens Dublin Cairo Lima Quito Tokyo Kyoto "
    "Seoul Delhi Lagos Boston Denver Sydney Geneva"
)
COLOURS = ("red", "blue", "green", "yellow", "white", "black", "brown", "grey", "pink", "orange", "purple", "golden")
COUNTS = tuple(str(n) for n in range(2, 31))
GIVING = ("gave", "sent", "brought", "lent", "sold")

# What a story says: giver, receiver, things, colour, count and place, each exactly determined by the text.
FRAMES = (
    "{giver} {gave} {receiver} {count} {colour} {things} in {place}.",
    "{giver} {gave} {count} {colour} {things} to {receiver} in {place}.",
    "In {place} {giver} {gave} {count} {colour} {things} to {receiver}.",
    "In {place} {receiver} got {count} {colour} {things} from {giver}.",
    "{receiver} lives in {place}. {giver} {gave} {r_him} {count} {colour} {things}.",
    "{giver} lives in {place}. {G_he} {gave} {receiver} {count} {colour} {things}.",
    "{giver} had {count} {things} in {place}. They were {colour}. {G_he} {gave} them to {receiver}.",
    "{receiver} got {count} {things} from {giver}. The {things} were {colour}. This was in {place}.",
    "{receiver} was in {place}. There {r_he} got {count} {colour} {things} from {giver}.",
    "{giver} and {receiver} met in {place}. {giver} {gave} {receiver} {count} {things}. All of them were {colour}.",
    "A shop in {place} has {colour} {things}. {giver} bought {count} of them for {receiver}.",
    "{receiver} asked {giver} for {colour} {things}. {G_he} {gave} {r_him} {count} of them in {place}.",
)
ASIDES = ("{other} was not there.", "{other} saw it.", "{other} was there too.", "It was a {weather} {day}.")
WEATHER = ("cold", "warm", "sunny", "rainy", "windy")
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")

# What pretraining recalls of a story. The words of the record's keys occur here, its `key: value` form does not.
RECALLS = (
    "Who {gave} the {things}? {giver} did.",
    "Who got the {things}? {receiver} did.",
    'Who are the {things} from? "from {giver}," said {receiver}.',
    "Who did {giver} see? {receiver}.",
    "What did {receiver} get? {count} {colour} {things}.",
    "What is the item? The item is {things}.",
    "How many {things} were there? There were {count}.",
    "What colour were they? They were {colour}.",
    "Where was this? It was in {place}.",
    "The place is {place}.",
    "The count is {count}.",
    "The colour is {colour}.",
    "The {things} went to {receiver}.",
    "The {things} came from {giver}.",
    "{receiver} thanked {giver} for the {things}.",
    "Now {receiver} has {count} {colour} {things}.",
    "The {colour} {things} stayed in {place}.",
    "{receiver} said: my {things} are {colour}; I have {count}.",
    "{giver} said: we were in {place}; I saw {receiver}.",
)

RECORD_FIELD = re.compile(r"\b(from|to|item|colour|count|place): ")
RECORD = "from: {giver}; to: {receiver}; item: {things}; colour: {colour}; count: {count}; place: {place}"
KEYS = ("from", "to", "item", "colour", "count", "place")

PRETRAIN_SEED, HELD_OUT_SEED, TASK_SEED = 1, 2, 3
TRAIN_EXAMPLES, EVAL_EXAMPLES = 2000, 200
_HELD_OUT_SHARE = 8  # one in so many pairs of a giver and a receiver is kept for the held-out examples


@dataclass(frozen=True, kw_only=True)
class Gift:
    """The facts of one story: who passed how many of what, of which colour, to whom and where."""

    giver: str
    receiver: str
    other: str
    things: str
    colour: str
    count: str
    place: str
    gave: str

    def words(self) -> dict[str, str]:
        """The fields of the frames, pronouns included (`r_him`: the receiver's, `G_he`: the giver's, capital)."""
        giver_is_woman, receiver_is_woman = self.giver in WOMEN, self.receiver in WOMEN
        pronouns = {
            "G_he": "She" if giver_is_woman else "He",
            "r_he": "she" if receiver_is_woman else "he",
            "r_him": "her" if receiver_is_woman else "him",
        }
        return {**self.__dict__, **pronouns}


def draw_gift(rng: Random) -> Gift:
    """Facts drawn uniformly; the three people differ."""
    giver, receiver, other = rng.sample(NAMES, 3)
    return Gift(
        giver=giver,
        receiver=receiver,
        other=other,
        things=rng.choice(THINGS),
        colour=rng.choice(COLOURS),
        count=rng.choice(COUNTS),
        place=rng.choice(PLACES),
        gave=rng.choice(GIVING),
    )


def tell(rng: Random, gift: Gift) -> str:
    """A story of one to three sentences with every fact of `gift`, and at times an aside that the record ignores."""
    frame = rng.choice(FRAMES)
    if frame.count(".") < 3 and rng.random() < 0.4:
        aside = rng.choice(ASIDES)
        frame = f"{aside} {frame}" if rng.random() < 0.5 else f"{frame} {aside}"
    return frame.format(**gift.words(), weather=rng.choice(WEATHER), day=rng.choice(DAYS))


def record(gift: Gift) -> str:
    """The record that the task asks for, on one line."""
    return RECORD.format(**gift.words())


def _retold_story(rng: Random) -> str:
    """The same facts told two to four times in different words, and one to three recalls, on one line or two."""
    gift = draw_gift(rng)
    tellings = " ".join(tell(rng, gift) for _ in range(rng.randint(2, 4)))
    recalls = " ".join(rng.sample(RECALLS, rng.randint(1, 3))).format(**gift.words())
    return tellings + rng.choice(" \n") + recalls


def _likings(rng: Random) -> str:
    """Three to five people, what each likes, and questions about some of them: one of several facts is wanted."""
    people = rng.sample(NAMES, rng.randint(3, 5))
    noun, values = rng.choice((("colour", COLOURS), ("place", PLACES), ("item", THINGS), ("count", COUNTS)))
    likes = dict(zip(people, rng.sample(values, len(people)), strict=True))
    facts = " ".join(f"{name} likes {value}." for name, value in likes.items())
    asked = rng.sample(people, 2)
    recalls = " ".join(f"Which {noun} does {name} like? {name} likes {likes[name]}." for name in asked)
    return facts + rng.choice(" \n") + recalls


def _dictation(rng: Random) -> str:
    """A list of words without a pattern, read aloud two to four times: only copying predicts the repetitions."""
    words = rng.sample(NAMES + THINGS + PLACES + COLOURS + COUNTS, rng.randint(3, 8))
    readers = rng.sample(NAMES, rng.randint(2, 4))
    return rng.choice(" \n").join(f"{reader} read: {' '.join(words)}." for reader in readers)


def pretraining_text(seed: int) -> Iterator[str]:
    """Documents of the toy language without end, of some 30 to 110 tokens each."""
    rng = Random(seed)  # noqa: S311  # reproducible text, no secret
    while True:
        kind = rng.random()
        make = _retold_story if kind < 0.65 else _dictation if kind < 0.9 else _likings
        yield make(rng)


def _held_out_pairs() -> frozenset[tuple[str, str]]:
    """The ordered pairs (giver, receiver) that only held-out examples use."""
    pairs = [(a, b) for a in NAMES for b in NAMES if a != b]
    return frozenset(Random(TASK_SEED).sample(pairs, len(pairs) // _HELD_OUT_SHARE))  # noqa: S311


def task_examples() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The task's training and held-out examples, each `{"prompt": story, "completion": record}`.

    No prompt occurs twice, and no giver and receiver of a held-out story meet in that order in training.
    """
    rng = Random(TASK_SEED)  # noqa: S311  # reproducible examples, no secret
    held_out = _held_out_pairs()
    train: dict[str, str] = {}
    evaluation: dict[str, str] = {}
    while len(train) < TRAIN_EXAMPLES or len(evaluation) < EVAL_EXAMPLES:
        gift = draw_gift(rng)
        wanted, size = (
            (evaluation, EVAL_EXAMPLES) if (gift.giver, gift.receiver) in held_out else (train, TRAIN_EXAMPLES)
        )
        story = tell(rng, gift)
        if len(wanted) < size:
            wanted[story] = record(gift)
    return _as_examples(train), _as_examples(evaluation)


def _as_examples(completions: dict[str, str]) -> list[dict[str, str]]:
    return [{"prompt": story, "completion": completion} for story, completion in completions.items()]
