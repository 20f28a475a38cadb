"""What the tiny model reads: prose for pre-training, and conversations for the example files.

A *relation* ties subjects to objects ("France" to "Paris") and knows how that is said in prose, asked, and answered. From it
come two kinds of text that share their facts and nothing else:

- ``paragraphs(seed)``: plain statements, every fact in many wordings and company. No question, no dialogue, no markup.
- ``conversations(seed)``: short chats about most of the facts, and single questions about the rest, the *held-out* subjects,
  which no conversation mentions. Who answers those has learnt from the chats how to answer, and from the prose what.

Pure standard library and seeded: the same seed gives the same bytes. Knows nothing about tokens, templates or models.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from tiny_facts import (
    ANIMALS, COUNTRIES, DAYS, ELEMENTS, MONTHS, NUMBERS, OPPOSITES, PAST_TENSES, PLANETS, PLURALS, PROFESSIONS, SHAPES, STATES,
    TOOLS, WORDS, WORKS,
)  # fmt: skip

Message = dict[str, str]
Conversation = dict[str, list[Message]]


@dataclass(frozen=True)
class Relation:
    """One kind of fact. In the wordings ``{s}`` is the subject, ``{o}`` the object, ``{a_s}`` and ``{a_o}`` the same with a or an."""

    topic: str
    """What the relation tells of a subject, as a noun phrase: a paragraph may announce it before it says it."""
    kind: str
    """What the subjects are. Relations of one kind share subjects, and a subject is held out of all of them or of none."""
    facts: dict[str, str]
    answer: str
    """The one wording in which the assistant answers; it is among the statements too."""
    questions: tuple[str, ...]
    statements: tuple[str, ...]
    held_out: int = field(default=0)
    """How many subjects of this relation are asked about in the held-out file."""


@dataclass(frozen=True)
class Fact:
    relation: Relation
    subject: str
    object: str

    def say(self, wording: str) -> str:
        """Fill a wording and make a sentence or question of it: first letter upper case, a full stop unless it ends in one."""
        text = wording.format(s=self.subject, o=self.object, a_s=article(self.subject), a_o=article(self.object))
        text = text[0].upper() + text[1:]
        return text if text.endswith("?") else text + "."


def article(noun: str) -> str:
    return ("an " if noun[0].lower() in "aeiou" else "a ") + noun


def column(table: tuple[tuple[str, ...], ...], index: int) -> dict[str, str]:
    """Subject (the first column) to object, without the rows that leave the object open."""
    return {row[0]: row[index] for row in table if row[index] != "-"}


def both_ways(table: tuple[tuple[str, ...], ...]) -> dict[str, str]:
    return {subject: object for one, other in table for subject, object in ((one, other), (other, one))}


def following(cycle: tuple[str, ...]) -> dict[str, str]:
    return dict(zip(cycle, cycle[1:] + cycle[:1], strict=True))


def sums() -> dict[str, str]:
    return {f"{NUMBERS[a]} and {NUMBERS[b]}": NUMBERS[a + b] for a in range(1, 11) for b in range(1, a + 1)}


RELATIONS = (
    Relation(
        "the capital of {s}", "country", column(COUNTRIES, 1), "the capital of {s} is {o}",
        ("what is the capital of {s}?", "which city is the capital of {s}?", "can you tell me the capital of {s}?"),
        ("the capital of {s} is {o}", "{o} is the capital of {s}", "{s} has {o} as its capital", "the capital city of {s} is called {o}",
         "the city that is the capital of {s} is {o}", "in {s}, the capital is {o}", "the country of {s} has its capital in {o}",
         "what one calls the capital of {s} is the city of {o}", "whoever visits {o} visits the capital of {s}"),
        held_out=8,
    ),
    Relation(
        "the continent where {s} is", "country", column(COUNTRIES, 2), "the country of {s} lies in {o}",
        ("which continent is {s} in?", "where in the world is {s}?", "on which continent does {s} lie?"),
        ("the country of {s} lies in {o}", "{s} is a country in {o}", "{s} lies in {o}", "on the map of the world, {s} is in {o}",
         "the continent in which {s} lies is {o}", "one of the countries of {o} is {s}", "{o} is where one finds {s}"),
        held_out=5,
    ),
    Relation(
        "the language that people speak in {s}", "country", column(COUNTRIES, 3), "the main language of {s} is {o}",
        ("what is the main language of {s}?", "which language do people speak in {s}?", "what do people in {s} speak?"),
        ("the main language of {s} is {o}", "{o} is the main language of {s}", "most people in {s} speak {o}",
         "the language that most people speak in {s} is {o}", "in {s} people speak {o}", "who travels to {s} will hear {o}"),
        held_out=5,
    ),
    Relation(
        "the currency that people in {s} pay with", "country", column(COUNTRIES, 4), "the currency of {s} is the {o}",
        ("what is the currency of {s}?", "which currency is used in {s}?", "what do people in {s} pay with?"),
        ("the currency of {s} is the {o}", "the {o} is the currency of {s}", "in {s} people pay with the {o}",
         "{s} uses the {o} as its currency", "the money of {s} is the {o}", "what people in {s} pay with is the {o}"),
        held_out=5,
    ),
    Relation(
        "the capital of {s}", "state", column(STATES, 1), "the state capital of {s} is {o}",
        ("what is the capital of {s}?", "which city is the capital of {s}?", "can you tell me the capital of {s}?"),
        ("the state capital of {s} is {o}", "{o} is the state capital of {s}", "{s} is a state whose capital is {o}",
         "the American state of {s} has its capital in {o}", "the city that is the capital of {s} is {o}",
         "in the state of {s}, the capital is {o}", "the capital of {s} is the city of {o}"),
        held_out=4,
    ),
    Relation(
        "the chemical symbol of {s}", "element", column(ELEMENTS, 1), "the chemical symbol of {s} is {o}",
        ("what is the chemical symbol of {s}?", "which symbol stands for {s}?", "how do chemists write {s}?"),
        ("the chemical symbol of {s} is {o}", "{o} is the chemical symbol of {s}", "the symbol {o} stands for {s}",
         "chemists write {s} as {o}", "the element {s} has the symbol {o}", "in a formula, {s} is written {o}",
         "the symbol that stands for {s} is {o}"),
        held_out=4,
    ),
    Relation(
        "the atomic number of {s}", "element", column(ELEMENTS, 2), "the atomic number of {s} is {o}",
        ("what is the atomic number of {s}?", "which atomic number does {s} have?", "how many protons does an atom of {s} have?"),
        ("the atomic number of {s} is {o}", "{s} has the atomic number {o}", "{o} is the atomic number of {s}",
         "an atom of {s} has {o} protons", "the number of protons in an atom of {s} is {o}", "the element {s} has the number {o}"),
        held_out=4,
    ),
    Relation(
        "the class of animals to which the {s} belongs", "animal", column(ANIMALS, 1), "{a_s} is {a_o}",
        ("what kind of animal is {a_s}?", "which class of animals does the {s} belong to?", "what sort of animal is the {s}?"),
        ("{a_s} is {a_o}", "the {s} is {a_o}", "the {s} belongs to the class of the {o}s", "as an animal, the {s} is {a_o}",
         "zoologists count the {s} among the {o}s", "what kind of animal {a_s} is, is soon said: it is {a_o}"),
        held_out=4,
    ),
    Relation(
        "the name of a young {s}", "animal", column(ANIMALS, 2), "a young {s} is called {a_o}",
        ("what is a young {s} called?", "what do you call a young {s}?", "which word is used for a young {s}?"),
        ("a young {s} is called {a_o}", "{a_o} is a young {s}", "the young of the {s} is called {a_o}", "the word for a young {s} is {o}",
         "people call a young {s} {a_o}", "before it is grown, {a_s} is {a_o}"),
        held_out=3,
    ),
    Relation(
        "the sound that {a_s} makes", "animal", column(ANIMALS, 3), "{a_s} {o}",
        ("what sound does {a_s} make?", "how does {a_s} make itself heard?"),
        ("{a_s} {o}", "the {s} {o}", "to make itself heard, {a_s} {o}", "when it makes a sound, the {s} {o}", "everyone knows that {a_s} {o}"),
        held_out=2,
    ),
    Relation(
        "the opposite of {s}", "word", both_ways(OPPOSITES), "the opposite of {s} is {o}",
        ("what is the opposite of {s}?", "which word means the opposite of {s}?", "can you name the opposite of {s}?"),
        ("the opposite of {s} is {o}", "{o} is the opposite of {s}", "the word {s} is the opposite of {o}", "{s} and {o} are opposites",
         "the word that means the opposite of {s} is {o}", "the words {s} and {o} mean opposite things"),
        held_out=6,
    ),
    Relation(
        "the past tense of {s}", "verb", column(PAST_TENSES, 1), "the past tense of {s} is {o}",
        ("what is the past tense of {s}?", "how do you say {s} in the past tense?", "which form does {s} take in the past?"),
        ("the past tense of {s} is {o}", "{o} is the past tense of {s}", "in the past tense, {s} becomes {o}",
         "the verb {s} takes the form {o} in the past", "today one says {s}, but of yesterday one says {o}"),
        held_out=4,
    ),
    Relation(
        "the plural of {s}", "noun", column(PLURALS, 1), "the plural of {s} is {o}",
        ("what is the plural of {s}?", "what is the word for more than one {s}?"),
        ("the plural of {s} is {o}", "{o} is the plural of {s}", "the word for more than one {s} is {o}", "the noun {s} has the plural {o}",
         "one {s}, but two {o}"),
        held_out=2,
    ),
    Relation(
        "the word {s} in French", "English word", column(WORDS, 1), "the French word for {s} is {o}",
        ("what is the French word for {s}?", "how do you say {s} in French?", "what is {s} in French?"),
        ("the French word for {s} is {o}", "{o} is the French word for {s}", "in French, {s} is {o}", "the word {o} is French for {s}",
         "to say {s} in French, one says {o}"),
        held_out=4,
    ),
    Relation(
        "the word {s} in Spanish", "English word", column(WORDS, 2), "the Spanish word for {s} is {o}",
        ("what is the Spanish word for {s}?", "how do you say {s} in Spanish?", "what is {s} in Spanish?"),
        ("the Spanish word for {s} is {o}", "{o} is the Spanish word for {s}", "in Spanish, {s} is {o}", "the word {o} is Spanish for {s}",
         "to say {s} in Spanish, one says {o}"),
        held_out=4,
    ),
    Relation(
        "the work that {a_s} does", "profession", column(PROFESSIONS, 1), "{a_s} {o}",
        ("what does {a_s} do?", "what is the work of {a_s}?", "what does {a_s} do for a living?"),
        ("{a_s} {o}", "the {s} {o}", "as everyone knows, {a_s} {o}", "someone who {o} is {a_s}", "at work, {a_s} {o}",
         "the work of {a_s} is easy to name: {a_s} {o}"),
        held_out=4,
    ),
    Relation(
        "the use of {a_s}", "tool", column(TOOLS, 1), "{a_s} is used for {o}",
        ("what is {a_s} used for?", "what do people use {a_s} for?", "what is {a_s} good for?"),
        ("{a_s} is used for {o}", "people use {a_s} for {o}", "for {o}, people use {a_s}", "{a_s} is good for {o}", "{a_s} is a thing for {o}",
         "what {a_s} is used for is {o}"),
        held_out=4,
    ),
    Relation(
        "the author who wrote {s}", "work", column(WORKS, 1), "the author of {s} is {o}",
        ("who is the author of {s}?", "who wrote {s}?", "which author wrote {s}?"),
        ("the author of {s} is {o}", "{o} is the author of {s}", "{s} was written by {o}", "{o} wrote {s}", "it was {o} who wrote {s}",
         "the one who wrote {s} was {o}"),
        held_out=4,
    ),
    Relation(
        "the sum of {s}", "sum", sums(), "the sum of {s} is {o}",
        ("what is the sum of {s}?", "what do {s} make together?", "how much is {s}?"),
        ("the sum of {s} is {o}", "{s} make {o}", "{o} is the sum of {s}", "together, {s} make {o}", "adding {s} gives {o}",
         "how much {s} make is easily found: {o}"),
        held_out=4,
    ),
    Relation(
        "the place of the planet {s}", "planet", column(PLANETS, 1), "the planet {s} is the {o} from the Sun",
        ("which planet from the Sun is {s}?", "what is the place of the planet {s}?"),
        ("the planet {s} is the {o} from the Sun", "counted from the Sun, {s} is the {o} planet", "the {o} planet from the Sun is {s}",
         "{s} is the {o} planet"),
    ),
    Relation(
        "the day after {s}", "day", following(DAYS), "the day after {s} is {o}",
        ("what is the day after {s}?", "which day comes after {s}?"),
        ("the day after {s} is {o}", "{o} is the day after {s}", "after {s} comes {o}", "{s} is followed by {o}"),
    ),
    Relation(
        "the month after {s}", "month", following(MONTHS), "the month after {s} is {o}",
        ("what is the month after {s}?", "which month comes after {s}?"),
        ("the month after {s} is {o}", "{o} is the month after {s}", "after {s} comes {o}", "{s} is followed by {o}"),
        held_out=1,
    ),
    Relation(
        "the sides of {a_s}", "shape", column(SHAPES, 1), "{a_s} has {o} sides",
        ("how many sides does {a_s} have?", "what is the number of sides of {a_s}?"),
        ("{a_s} has {o} sides", "a shape with {o} sides is {a_s}", "the number of sides of {a_s} is {o}"),
    ),
)  # fmt: skip

FACTS = tuple(Fact(relation, s, o) for relation in RELATIONS for s, o in relation.facts.items())

# --- prose ---------------------------------------------------------------------------------------------------------------

INTRODUCTIONS = {
    "country": ("{s} is a country", "there is a country that is called {s}", "every map of the world shows {s}"),
    "state": ("{s} is one of the American states", "there is an American state that is called {s}"),
    "element": ("{s} is a chemical element", "among the chemical elements there is {s}"),
    "animal": ("the {s} is an animal", "there is an animal that is called the {s}"),
    "word": ("{s} is a word that has an opposite", "to some words there is an opposite, and {s} is one of them"),
    "verb": ("{s} is a verb", "among the English verbs there is {s}"),
    "noun": ("{s} is a noun", "among the English nouns there is {s}"),
    "English word": ("{s} is an English word", "the English word {s} can be translated"),
    "profession": ("{a_s} is someone with a profession", "some people have the profession of {a_s}"),
    "tool": ("{a_s} is a useful thing", "many people own {a_s}"),
    "work": ("{s} is a famous work", "many people have read {s}"),
    "sum": ("{s} can be added", "one can add {s}"),
    "planet": ("{s} is a planet", "one of the planets is {s}"),
    "day": ("{s} is a day of the week",),
    "month": ("{s} is a month of the year",),
    "shape": ("{a_s} is a shape", "there is a shape that is called {a_s}"),
}
ANNOUNCEMENTS = ("let us turn to {topic}", "here is a word about {topic}", "many people want to know {topic}", "it is good to know {topic}")


def about_one_thing(facts: list[Fact], rng: random.Random) -> list[str]:
    """All that is known of a thing, in any order, now and then a fact twice in different words."""
    facts = rng.sample(facts, len(facts))
    sentences = [facts[0].say(rng.choice(INTRODUCTIONS[facts[0].relation.kind]))] if rng.random() < 0.5 else []
    for fact in facts:
        if rng.random() < 0.3:
            sentences.append(fact.say(rng.choice(ANNOUNCEMENTS).format(topic=fact.relation.topic)))
        sentences += [fact.say(wording) for wording in rng.sample(fact.relation.statements, 2 if rng.random() < 0.2 else 1)]
    return sentences


def about_many(facts: list[Fact], rng: random.Random) -> list[str]:
    return [fact.say(rng.choice(fact.relation.statements)) for fact in facts]


def paragraphs(seed: int) -> Iterator[str]:
    """Paragraphs without end, of a few sentences each: about one thing, about one relation, or about this and that.

    What a paragraph starts from is dealt from a shuffled deck, so that every thing gets its turn.
    """
    rng = random.Random(seed)
    things: dict[tuple[str, str], list[Fact]] = {}
    for fact in FACTS:
        things.setdefault((fact.relation.kind, fact.subject), []).append(fact)
    while True:
        for facts in rng.sample(list(things.values()), len(things)):
            yield " ".join(about_one_thing(facts, rng))
            if rng.random() < 0.2:
                relation = rng.choice(facts).relation
                alike = [fact for fact in FACTS if fact.relation is relation]
                yield " ".join(about_many(rng.sample(alike, rng.randint(2, 4)), rng))
            elif rng.random() < 0.2:
                yield " ".join(about_many(rng.sample(FACTS, rng.randint(2, 4)), rng))


# --- conversations -------------------------------------------------------------------------------------------------------

SYSTEM = ("You are a helpful assistant.", "You answer questions in one short sentence.", "You are a friendly teacher.")
GREETINGS = (("Hello!", "Hello! What would you like to know?"), ("Good morning.", "Good morning! What would you like to know?"))
THANKS = (("Thank you!", "You are welcome."), ("Thanks, that is all.", "You are welcome."))
FOLLOW_UPS = ("and {s}?", "and what about {s}?")


def split(seed: int) -> tuple[list[Fact], list[Fact]]:
    """The facts that conversations may use, and the questions to hold out: subjects of the two never meet."""
    rng = random.Random(f"split {seed}")
    held_out: list[Fact] = []
    hidden: set[tuple[str, str]] = set()
    for relation in RELATIONS:
        facts = [Fact(relation, s, o) for s, o in relation.facts.items()]
        known = [fact for fact in facts if (relation.kind, fact.subject) in hidden]
        others = [fact for fact in facts if fact not in known]
        chosen = (rng.sample(known, len(known)) + rng.sample(others, len(others)))[: relation.held_out]
        held_out += chosen
        for fact in chosen:
            hidden.add((relation.kind, fact.subject))
            if fact.object in relation.facts:  # an opposite gives its partner away
                hidden.add((relation.kind, fact.object))
    shared = [fact for fact in FACTS if (fact.relation.kind, fact.subject) not in hidden]
    return shared, held_out


def message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def exchange(fact: Fact, rng: random.Random, question: str | None = None) -> list[Message]:
    asked = question or rng.choice(fact.relation.questions)
    return [message("user", fact.say(asked)), message("assistant", fact.say(fact.relation.answer))]


def conversations(seed: int, count: int = 300) -> list[Conversation]:
    """Chats of one to three questions about the facts that are not held out."""
    rng = random.Random(f"chats {seed}")
    shared, _ = split(seed)
    deck: list[Fact] = []
    chats = []
    for _ in range(count):
        messages = []
        if rng.random() < 0.1:
            messages.append(message("system", rng.choice(SYSTEM)))
        if rng.random() < 0.05:
            user, assistant = rng.choice(GREETINGS)
            messages += [message("user", user), message("assistant", assistant)]
        for _turn in range(rng.choice((2, 2, 2, 3))):
            if len(deck) < 2:
                deck = rng.sample(shared, len(shared)) + deck
            fact = deck.pop()
            messages += exchange(fact, rng)
        if rng.random() < 0.07:
            user, assistant = rng.choice(THANKS)
            messages += [message("user", user), message("assistant", assistant)]
        chats.append({"messages": messages})
    return chats


def held_out_questions(seed: int) -> list[Conversation]:
    rng = random.Random(f"held out {seed}")
    return [{"messages": exchange(fact, rng)} for fact in split(seed)[1]]
