"""What the tiny model reads: prose for pre-training, and conversations for the example files.

Two kinds of text that share their facts and nothing else:

- ``paragraphs(seed)``: plain statements, every fact in many wordings and company. No question, no dialogue, no markup.
- ``conversations(seed)``: short chats about most of the facts, and single questions about the rest, the *held-out* ones,
  which no conversation asks for. Who answers those has learnt from the chats how to answer, and from the prose what.

Pure standard library and seeded: the same seed gives the same bytes. Knows nothing about tokens, templates or models.
"""

import random
from collections.abc import Iterator

from tiny_relations import FACTS, RELATIONS, Fact

Message = dict[str, str]
Conversation = dict[str, list[Message]]


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
    "tool": ("{a_s} is a useful thing", "among the things that people use there is {a_s}"),
    "work": ("{s} is a famous work", "many people have read {s}"),
    "sum": ("{s} can be added", "one can add {s}"),
    "planet": ("{s} is a planet", "one of the planets is {s}"),
    "day": ("{s} is a day of the week",),
    "month": ("{s} is a month of the year",),
    "shape": ("{a_s} is a shape", "there is a shape that is called {a_s}"),
}
ANNOUNCEMENTS = ("many people want to know {topic}", "it is good to know {topic}", "not everyone knows {topic}")


def about_one_thing(facts: list[Fact], rng: random.Random) -> list[str]:
    """All that is known of a thing, in any order, now and then a fact twice in different words."""
    facts = rng.sample(facts, len(facts))
    sentences = [facts[0].say(rng.choice(INTRODUCTIONS[facts[0].relation.kind]))] if rng.random() < 0.5 else []
    for fact in facts:
        if rng.random() < 0.3:
            sentences.append(fact.say(rng.choice(ANNOUNCEMENTS).format(topic=rng.choice(fact.relation.topics))))
        sentences += [
            fact.say(wording) for wording in rng.sample(fact.relation.wordings, 2 if rng.random() < 0.2 else 1)
        ]
    return sentences


def about_many(facts: list[Fact], rng: random.Random) -> list[str]:
    return [fact.say(rng.choice(fact.relation.wordings)) for fact in facts]


def paragraphs(seed: int) -> Iterator[str]:
    """Paragraphs without end, of a few sentences each: about one thing, about one relation, or about this and that.

    What a paragraph starts from is dealt from a shuffled deck, so that every thing gets its turn. Half of those about one
    thing are written a sentence a line: who has only seen new lines begin new subjects will not look back over one.
    """
    rng = random.Random(seed)
    things: dict[tuple[str, str], list[Fact]] = {}
    for fact in FACTS:
        things.setdefault((fact.relation.kind, fact.subject), []).append(fact)
    while True:
        for facts in rng.sample(list(things.values()), len(things)):
            yield rng.choice((" ", "\n")).join(about_one_thing(facts, rng))
            if rng.random() < 0.2:
                relation = rng.choice(facts).relation
                alike = [fact for fact in FACTS if fact.relation is relation]
                yield " ".join(about_many(rng.sample(alike, rng.randint(2, 4)), rng))
            elif rng.random() < 0.2:
                yield " ".join(about_many(rng.sample(FACTS, rng.randint(2, 4)), rng))


# --- conversations -------------------------------------------------------------------------------------------------------

SYSTEM = ("You are a helpful assistant.", "You answer questions in one short sentence.", "You are a friendly teacher.")
GREETINGS = (
    ("Hello!", "Hello! What would you like to know?"),
    ("Good morning.", "Good morning! What would you like to know?"),
)
THANKS = (("Thank you!", "You are welcome."), ("Thanks, that is all.", "You are welcome."))
DEALT = 30
"""How many facts of a relation are dealt before they are dealt anew."""


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
        hidden |= {(relation.kind, fact.subject) for fact in chosen}
    shared = [fact for fact in FACTS if (fact.relation.kind, fact.subject) not in hidden]
    return shared, held_out


def exchange(user: str, assistant: str) -> list[Message]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def question_and_answer(fact: Fact, rng: random.Random) -> list[Message]:
    return exchange(fact.say(rng.choice(fact.relation.questions)), fact.say(fact.relation.answer))


def conversations(seed: int, count: int = 300) -> list[Conversation]:
    """Chats of two or three questions about the facts that are not held out."""
    rng = random.Random(f"chats {seed}")
    shared, _ = split(seed)
    alike = [[fact for fact in shared if fact.relation is relation] for relation in RELATIONS]
    deck: list[Fact] = []
    chats = []
    for _ in range(count):
        messages: list[Message] = []
        if rng.random() < 0.1:
            messages.append({"role": "system", "content": rng.choice(SYSTEM)})
        if rng.random() < 0.05:
            messages += exchange(*rng.choice(GREETINGS))
        for _turn in range(rng.choice((2, 2, 2, 3))):
            if not deck:  # a share of each relation, so that the rarer questions are met often enough
                deck = [fact for facts in alike for fact in rng.sample(facts, min(len(facts), DEALT))]
                rng.shuffle(deck)
            messages += question_and_answer(deck.pop(), rng)
        if rng.random() < 0.07:
            messages += exchange(*rng.choice(THANKS))
        chats.append({"messages": messages})
    return chats


def preferences(seed: int, count: int = 200) -> list[dict[str, list[Message]]]:
    """Pairs of answers to questions about the facts that are not held out: the longer wording, which prose has too, is chosen."""
    rng = random.Random(f"preferences {seed}")
    pairs = []
    for fact in rng.sample(split(seed)[0], count):
        question, sentence = question_and_answer(fact, rng)
        known = (text for text in fact.relation.statements if text.index("s}") < text.index("o}"))
        longer = sentence | {"content": fact.say(max(known, key=len))}
        pairs.append({"prompt": [question], "chosen": [longer], "rejected": [sentence]})
    return pairs


def held_out_questions(seed: int) -> list[Conversation]:
    rng = random.Random(f"held out {seed}")
    return [{"messages": question_and_answer(fact, rng)} for fact in split(seed)[1]]
