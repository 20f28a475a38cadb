"""What is said of the facts: how each kind of fact is told in prose, asked, and answered.

A *relation* ties subjects to objects ("France" to "Paris") and holds the wordings for that. It knows no paragraphs and no
conversations (``tiny_corpus.py`` makes them), and takes the facts as they stand in ``tiny_facts.py``.
"""

from dataclasses import dataclass

import tiny_facts as tables


@dataclass(frozen=True)
class Relation:
    """One kind of fact. In the wordings ``{s}`` is the subject, ``{o}`` the object, ``{a_s}`` and ``{a_o}`` the same with a or an."""

    kind: str
    """What the subjects are. Relations of one kind share subjects, and a subject is held out of all of them or of none."""
    facts: dict[str, str]
    """Subject to object."""
    answer: str
    """The one wording in which the assistant answers; prose uses it too."""
    statements: tuple[str, ...]
    """The other wordings of prose."""
    topics: tuple[str, ...]
    """What there is to know of a subject: a paragraph may announce it before it says it."""
    questions: tuple[str, ...]
    held_out: int = 0
    """How many subjects are asked about in the held-out file."""

    @property
    def wordings(self) -> tuple[str, ...]:
        return (self.answer, *self.statements)


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


def following(cycle: tuple[str, ...]) -> dict[str, str]:
    return dict(zip(cycle, cycle[1:] + cycle[:1], strict=True))


def sums() -> dict[str, str]:
    """Sums up to eight and eight, the larger number first."""
    words = tables.NUMBERS
    return {f"{words[a]} and {words[b]}": words[a + b] for a in range(1, 9) for b in range(1, a + 1)}


RELATIONS = (
    Relation(
        kind="country",
        facts=column(tables.COUNTRIES, 1),
        answer="the capital of {s} is {o}",
        statements=(
            "{o} is the capital of {s}",
            "{s} has {o} as its capital",
            "the capital city of {s} is called {o}",
            "the city that is the capital of {s} is {o}",
            "in {s}, the capital is {o}",
            "the country of {s} has its capital in {o}",
            "whoever visits {o} visits the capital of {s}",
        ),
        topics=("the capital of {s}", "which city is the capital of {s}"),
        questions=(
            "what is the capital of {s}?",
            "which city is the capital of {s}?",
            "can you tell me the capital of {s}?",
        ),
        held_out=7,
    ),
    Relation(
        kind="country",
        facts=column(tables.COUNTRIES, 2),
        answer="the country of {s} lies in {o}",
        statements=(
            "{s} is a country in {o}",
            "{s} lies in {o}",
            "on the map of the world, {s} is in {o}",
            "the continent in which {s} lies is {o}",
            "one of the countries of {o} is {s}",
            "{o} is where one finds {s}",
        ),
        topics=("where in the world {s} is", "which continent {s} is in"),
        questions=("which continent is {s} in?", "where in the world is {s}?", "on which continent does {s} lie?"),
        held_out=3,
    ),
    Relation(
        kind="country",
        facts=column(tables.COUNTRIES, 3),
        answer="the main language of {s} is {o}",
        statements=(
            "{o} is the main language of {s}",
            "people in {s} speak {o}",
            "the language that people speak in {s} is {o}",
            "in {s} people speak {o}",
            "who travels to {s} will hear {o}",
        ),
        topics=("the main language of {s}", "which language people speak in {s}"),
        questions=(
            "what is the main language of {s}?",
            "which language do people speak in {s}?",
            "what do people in {s} speak?",
        ),
        held_out=3,
    ),
    Relation(
        kind="country",
        facts=column(tables.COUNTRIES, 4),
        answer="the currency of {s} is the {o}",
        statements=(
            "the {o} is the currency of {s}",
            "in {s} people pay with the {o}",
            "{s} uses the {o} as its currency",
            "the money of {s} is the {o}",
            "what people in {s} pay with is the {o}",
        ),
        topics=("the currency of {s}", "what people in {s} pay with"),
        questions=("what is the currency of {s}?", "which currency is used in {s}?", "what do people in {s} pay with?"),
        held_out=4,
    ),
    Relation(
        kind="state",
        facts=column(tables.STATES, 1),
        answer="the capital of {s} is {o}",
        statements=(
            "the state capital of {s} is {o}",
            "{o} is the state capital of {s}",
            "{s} is a state whose capital is {o}",
            "the American state of {s} has its capital in {o}",
            "the city that is the capital of {s} is {o}",
            "in the state of {s}, the capital is {o}",
        ),
        topics=("the capital of {s}", "which city is the capital of {s}"),
        questions=(
            "what is the capital of {s}?",
            "which city is the capital of {s}?",
            "can you tell me the capital of {s}?",
        ),
        held_out=3,
    ),
    Relation(
        kind="element",
        facts=column(tables.ELEMENTS, 1),
        answer="the chemical symbol of {s} is {o}",
        statements=(
            "{o} is the chemical symbol of {s}",
            "the symbol {o} stands for {s}",
            "chemists write {s} as {o}",
            "the element {s} has the symbol {o}",
            "in a formula, {s} is written {o}",
            "the symbol that stands for {s} is {o}",
        ),
        topics=("the chemical symbol of {s}", "which symbol stands for {s}", "how chemists write {s}"),
        questions=("what is the chemical symbol of {s}?", "which symbol stands for {s}?", "how do chemists write {s}?"),
        held_out=3,
    ),
    Relation(
        kind="element",
        facts=column(tables.ELEMENTS, 2),
        answer="the atomic number of {s} is {o}",
        statements=(
            "{s} has the atomic number {o}",
            "{o} is the atomic number of {s}",
            "an atom of {s} has {o} protons",
            "the number of protons in an atom of {s} is {o}",
            "the element {s} has the number {o}",
        ),
        topics=("the atomic number of {s}", "how many protons an atom of {s} has"),
        questions=(
            "what is the atomic number of {s}?",
            "which atomic number does {s} have?",
            "how many protons does an atom of {s} have?",
        ),
        held_out=2,
    ),
    Relation(
        kind="animal",
        facts=column(tables.ANIMALS, 1),
        answer="the {s} is {a_o}",
        statements=(
            "{a_s} is {a_o}",
            "by its kind, the {s} is {a_o}",
            "as an animal, the {s} is {a_o}",
            "zoologists call the {s} {a_o}",
            "what kind of animal {a_s} is, is soon said: it is {a_o}",
        ),
        topics=("what kind of animal {a_s} is", "which group of animals the {s} belongs to"),
        questions=(
            "what kind of animal is {a_s}?",
            "which group of animals does the {s} belong to?",
            "what sort of animal is the {s}?",
        ),
        held_out=3,
    ),
    Relation(
        kind="animal",
        facts=column(tables.ANIMALS, 2),
        answer="the word for a young {s} is {o}",
        statements=(
            "a young {s} is called {a_o}",
            "{a_o} is a young {s}",
            "the young of the {s} is called {a_o}",
            "people call a young {s} {a_o}",
            "before it is grown, {a_s} is {a_o}",
        ),
        topics=("what a young {s} is called", "which word is used for a young {s}"),
        questions=(
            "what is a young {s} called?",
            "what do you call a young {s}?",
            "which word is used for a young {s}?",
        ),
        held_out=3,
    ),
    Relation(
        kind="animal",
        facts=column(tables.ANIMALS, 3),
        answer="the {s} {o}",
        statements=(
            "{a_s} {o}",
            "to make itself heard, {a_s} {o}",
            "making a sound, the {s} {o}",
            "everyone knows that {a_s} {o}",
        ),
        topics=("what sound {a_s} makes", "how {a_s} makes itself heard"),
        questions=("what sound does {a_s} make?", "how does {a_s} make itself heard?"),
        held_out=2,
    ),
    Relation(
        kind="word",
        facts=column(tables.OPPOSITES, 1),
        answer="the opposite of {s} is {o}",
        statements=(
            "{o} is the opposite of {s}",
            "the word {s} is the opposite of {o}",
            "{s} and {o} are opposites",
            "the word that means the opposite of {s} is {o}",
            "the words {s} and {o} mean opposite things",
        ),
        topics=("the opposite of {s}", "which word means the opposite of {s}"),
        questions=(
            "what is the opposite of {s}?",
            "which word means the opposite of {s}?",
            "can you name the opposite of {s}?",
        ),
        held_out=4,
    ),
    Relation(
        kind="verb",
        facts=column(tables.PAST_TENSES, 1),
        answer="the past tense of {s} is {o}",
        statements=(
            "{o} is the past tense of {s}",
            "in the past tense, {s} becomes {o}",
            "the verb {s} takes the form {o} in the past",
            "today one says {s}, but of yesterday one says {o}",
        ),
        topics=("the past tense of {s}", "how one says {s} in the past tense"),
        questions=(
            "what is the past tense of {s}?",
            "how do you say {s} in the past tense?",
            "which form does {s} take in the past?",
        ),
        held_out=3,
    ),
    Relation(
        kind="noun",
        facts=column(tables.PLURALS, 1),
        answer="the plural of {s} is {o}",
        statements=(
            "{o} is the plural of {s}",
            "the word for more than one {s} is {o}",
            "the noun {s} has the plural {o}",
            "one {s}, but two {o}",
        ),
        topics=("the plural of {s}", "the word for more than one {s}"),
        questions=("what is the plural of {s}?", "what is the word for more than one {s}?"),
        held_out=2,
    ),
    Relation(
        kind="English word",
        facts=column(tables.WORDS, 1),
        answer="the French word for {s} is {o}",
        statements=(
            "{o} is the French word for {s}",
            "in French, {s} is {o}",
            "the word {o} is French for {s}",
            "to say {s} in French, one says {o}",
        ),
        topics=("the French word for {s}", "how one says {s} in French"),
        questions=("what is the French word for {s}?", "how do you say {s} in French?", "what is {s} in French?"),
        held_out=3,
    ),
    Relation(
        kind="English word",
        facts=column(tables.WORDS, 2),
        answer="the Spanish word for {s} is {o}",
        statements=(
            "{o} is the Spanish word for {s}",
            "in Spanish, {s} is {o}",
            "the word {o} is Spanish for {s}",
            "to say {s} in Spanish, one says {o}",
        ),
        topics=("the Spanish word for {s}", "how one says {s} in Spanish"),
        questions=("what is the Spanish word for {s}?", "how do you say {s} in Spanish?", "what is {s} in Spanish?"),
        held_out=3,
    ),
    Relation(
        kind="profession",
        facts=column(tables.PROFESSIONS, 1),
        answer="the {s} {o}",
        statements=(
            "{a_s} {o}",
            "as everyone knows, {a_s} {o}",
            "it is {a_s} who {o}",
            "at work, {a_s} {o}",
            "the work of {a_s} is easy to name: {a_s} {o}",
        ),
        topics=("what {a_s} does", "what {a_s} does for a living", "the work of {a_s}"),
        questions=("what does {a_s} do?", "what is the work of {a_s}?", "what does {a_s} do for a living?"),
        held_out=3,
    ),
    Relation(
        kind="tool",
        facts=column(tables.TOOLS, 1),
        answer="the {s} is used for {o}",
        statements=(
            "{a_s} is used for {o}",
            "people use {a_s} for {o}",
            "for {o}, people use {a_s}",
            "{a_s} is good for {o}",
            "what {a_s} is used for is {o}",
        ),
        topics=("what {a_s} is used for", "what people use {a_s} for"),
        questions=("what is {a_s} used for?", "what do people use {a_s} for?", "what is {a_s} good for?"),
        held_out=3,
    ),
    Relation(
        kind="work",
        facts=column(tables.WORKS, 1),
        answer="the author of {s} is {o}",
        statements=(
            "{o} is the author of {s}",
            "{s} was written by {o}",
            "{o} wrote {s}",
            "it was {o} who wrote {s}",
            "the one who wrote {s} was {o}",
        ),
        topics=("the author of {s}", "who wrote {s}"),
        questions=("who is the author of {s}?", "who wrote {s}?", "which author wrote {s}?"),
        held_out=3,
    ),
    Relation(
        kind="sum",
        facts=sums(),
        answer="the sum of {s} is {o}",
        statements=(
            "{s} make {o}",
            "{o} is the sum of {s}",
            "together, {s} make {o}",
            "adding {s} gives {o}",
            "how much {s} make is easily found: {o}",
        ),
        topics=("the sum of {s}", "what {s} make together"),
        questions=("what is the sum of {s}?", "what do {s} make together?", "how much is {s}?"),
        held_out=3,
    ),
    Relation(
        kind="planet",
        facts=column(tables.PLANETS, 1),
        answer="the planet {s} is the {o} from the Sun",
        statements=(
            "counted from the Sun, {s} is the {o} planet",
            "the {o} planet from the Sun is {s}",
            "{s} is the {o} planet",
        ),
        topics=("the place of the planet {s}", "which planet from the Sun {s} is"),
        questions=("which planet from the Sun is {s}?", "what is the place of the planet {s}?"),
    ),
    Relation(
        kind="day",
        facts=following(tables.DAYS),
        answer="the day after {s} is {o}",
        statements=("{o} is the day after {s}", "after {s} comes {o}", "{s} is followed by {o}"),
        topics=("the day after {s}", "which day comes after {s}"),
        questions=("what is the day after {s}?", "which day comes after {s}?"),
    ),
    Relation(
        kind="month",
        facts=following(tables.MONTHS),
        answer="the month after {s} is {o}",
        statements=("{o} is the month after {s}", "after {s} comes {o}", "{s} is followed by {o}"),
        topics=("the month after {s}", "which month comes after {s}"),
        questions=("what is the month after {s}?", "which month comes after {s}?"),
    ),
    Relation(
        kind="shape",
        facts=column(tables.SHAPES, 1),
        answer="the {s} has {o} sides",
        statements=("{a_s} has {o} sides", "a shape with {o} sides is {a_s}", "the number of sides of {a_s} is {o}"),
        topics=("how many sides {a_s} has", "the number of sides of {a_s}"),
        questions=("how many sides does {a_s} have?", "what is the number of sides of {a_s}?"),
    ),
)

FACTS = tuple(Fact(relation, s, o) for relation in RELATIONS for s, o in relation.facts.items())
