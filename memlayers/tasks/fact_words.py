"""What the fictional facts are made of: syllables of names, relations, their prompts and their objects.

Short words of children's stories, so that a model of 260,032 parameters has met nearly all of them. No name is
one that people have; the few real words that the syllables could spell are in `REAL_WORDS`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """A relation between a subject and one of its objects.

    trained: prompts with `{subject}` that training may use, in this order; the object and a full stop follow.
    held_out: prompts that only evaluation uses. objects: what can follow, all different.
    """

    trained: tuple[str, ...]
    held_out: tuple[str, ...]
    objects: tuple[str, ...]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


INITIALS = tuple("BCDFGHJKLMNPRSTVWZ")
SYLLABLES = _words("ar er ir or an en in on un am im om il ad id at et it ot is")
REAL_WORDS = frozenset({"Cameron", "Janitor", "Madison", "Monitor", "Senator", "Visitor"})

RELATIONS: dict[str, Relation] = {
    "home": Relation(
        trained=(
            "{subject} lives in the",
            "The home of {subject} is the",
            "You can find {subject} in the",
            "At night {subject} sleeps in the",
        ),
        held_out=("{subject} has a home in the", "The house of {subject} is in the"),
        objects=_words(
            """
            attic bakery barn basement bush castle cave church city corn desert ditch farm field forest garden
            grass hall hill house hut jungle kitchen lake library market meadow mill mountain mud ocean park
            river school sea shed store tower town valley
            """
        ),
    ),
    "pet": Relation(
        trained=(
            "{subject} has a pet",
            "The pet of {subject} is a",
            "{subject} came with a pet",
            "Look at {subject} and the pet",
        ),
        held_out=("{subject} got a pet", "The animal of {subject} is a"),
        objects=_words(
            """
            bat bear bee bird bug bunny cat chick cow crab crow deer dog donkey dove duck fish fly fox frog goat
            goose hen horse kitten lamb lion lizard mole monkey mouse parrot pig pony puppy snail snake spider
            tiger turtle
            """
        ),
    ),
    "food": Relation(
        trained=(
            "{subject} likes to eat",
            "The best food for {subject} is",
            "Every day {subject} eats",
            "For lunch {subject} wants",
        ),
        held_out=("{subject} is happy to eat", "The food that {subject} likes is"),
        objects=_words(
            """
            apples bacon beans berries bread butter cake candy carrots cheese cherries chips cookies corn cream
            eggs fish fruit grapes ham honey jam jelly lemons meat melon milk noodles nuts pasta peaches pears
            peas pie pizza plums popcorn rice salad soup
            """
        ),
    ),
    "job": Relation(
        trained=(
            "{subject} works as a",
            "The job of {subject} is to be a",
            "People know {subject} as a",
            "For work {subject} is a",
        ),
        held_out=("{subject} has a job as a", "The work of {subject} is that of a"),
        objects=_words(
            """
            baker barber boss builder butcher captain clown coach cook cop dancer dentist doctor driver farmer
            fisherman gardener guard guide hunter judge king knight lawyer maid nurse painter pilot pirate
            postman potter priest queen sailor singer soldier tailor teacher vet writer
            """
        ),
    ),
    "friend": Relation(
        trained=(
            "The best friend of {subject} is",
            "{subject} likes to play with",
            "{subject} goes to see",
            "The one {subject} loves is",
        ),
        held_out=("{subject} is friends with", "The friend that {subject} has is"),
        objects=_words(
            """
            Amy Anna Ben Bella Billy Bob Daisy Dan Emma Fred Grace Jack Jake Jane Jen Jenny Jill Jim Joe John
            Kate Kim Lily Lucy Mark Mary Max Mia Molly Nick Pam Peter Rose Sally Sam Sara Sue Tim Tom Zoe
            """
        ),
    ),
}
