"""Words, draws and the record of a problem, shared by the families of maths problems."""

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

Choice = TypeVar("Choice")


class Person(NamedTuple):
    """A name with the pronouns that follow it."""

    name: str
    he: str
    his: str
    him: str

    @property
    def He(self) -> str:  # the pronoun at the start of a sentence
        return self.he.capitalize()

    def __str__(self) -> str:
        return self.name


class Thing(NamedTuple):
    """A noun that can be counted."""

    one: str
    many: str

    def __str__(self) -> str:
        return self.many


@dataclasses.dataclass(frozen=True)
class Problem:
    """A question, its worked solution and what an independent check needs.

    `given` holds the numbers drawn, by name; `answer` is in the unit of `answer_text`.
    """

    question: str
    steps: tuple[str, ...]
    answer: float
    answer_text: str
    given: dict[str, int]
    family: str = ""

    @property
    def text(self) -> str:
        """The problem as it is written to the training text."""
        solution = "\n".join(self.steps)
        return f"Question: {self.question}\nAnswer: {solution}\nThe answer is {self.answer_text}.\n"


SHE = """Ada Aisha Alma Amara Amina Anita Astrid Beatriz Bianca Carla Celia Chloe Clara Daria Dina
Edith Elena Elif Emma Esther Fatima Flora Freya Gina Greta Hana Helen Ida Ines Ingrid Iris
Jana Joan Judith Karin Kavya Laila Lara Leila Lena Lina Lucia Mabel Maria Marta Mei Mina
Mira Nadia Naomi Nina Nora Olga Paula Petra Priya Rita Rosa Ruth Sara Selma Sofia Stella
Tara Tessa Uma Vera Wanda Xenia Yara Yuki Zoe"""
HE = """Aaron Abdul Adam Ahmed Alan Amir Anton Arjun Ben Boris Bruno Carlos Chen Conrad Daniel David
Dev Diego Edgar Elias Emil Eric Felix Finn Frank George Hamza Hans Hugo Ian Ibrahim Ivan
Jack Jamal Jonas Jorge Julian Kamal Karl Kofi Kwame Lars Leo Liam Luis Marco Martin Max
Miguel Milan Mohamed Nils Noah Omar Oscar Otto Paul Pedro Peter Rahul Ravi Robert Sami
Samuel Simon Tariq Theo Thomas Tomas Umar Victor Walter Yusuf Zack"""
THINGS = """apple/apples banana/bananas pear/pears orange/oranges peach/peaches lemon/lemons
marble/marbles stamp/stamps coin/coins sticker/stickers card/cards button/buttons pencil/pencils
crayon/crayons shell/shells bead/beads ribbon/ribbons badge/badges book/books postcard/postcards
magnet/magnets key/keys stone/stones walnut/walnuts cherry/cherries plum/plums toy/toys
balloon/balloons candle/candles photo/photos puzzle/puzzles feather/feathers acorn/acorns
cookie/cookies muffin/muffins pin/pins cup/cups spoon/spoons tile/tiles brick/bricks egg/eggs
potato/potatoes carrot/carrots onion/onions tomato/tomatoes flower/flowers rose/roses
tulip/tulips seed/seeds bottle/bottles battery/batteries notebook/notebooks"""
WARES = """shirt/shirts jacket/jackets hat/hats scarf/scarves lamp/lamps chair/chairs kettle/kettles
backpack/backpacks game/games mug/mugs plate/plates blanket/blankets pillow/pillows basket/baskets
umbrella/umbrellas vase/vases ball/balls racket/rackets helmet/helmets clock/clocks poster/posters
flute/flutes drum/drums sweater/sweaters pan/pans brush/brushes ladder/ladders wallet/wallets"""
CONTAINERS = """box/boxes bag/bags jar/jars crate/crates basket/baskets tray/trays carton/cartons
drawer/drawers shelf/shelves packet/packets tin/tins sack/sacks"""
PLACES = """the market|the school fair|the library|a small shop|the bakery|the garden centre
the toy store|the museum shop|the village store|the corner shop|the harbour market"""
CITIES = """Arden Birchwood Clearwater Dunmore Eastham Fairview Glenrock Hillcrest Ironbridge
Kingsley Lakeside Milton Northgate Oakfield Pinehurst Redhill Stonebridge Thornton Westbrook
Yarrow"""
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def _things(words: str) -> tuple[Thing, ...]:
    return tuple(Thing(*pair.split("/")) for pair in words.split())


_THINGS, _WARES, _CONTAINERS = _things(THINGS), _things(WARES), _things(CONTAINERS)
_PLACES, _CITIES = PLACES.replace("\n", "|").split("|"), CITIES.split()
_PEOPLE = [Person(name, "she", "her", "her") for name in SHE.split()]
_PEOPLE += [Person(name, "he", "his", "him") for name in HE.split()]


class Draw:
    """Draws the people, things, numbers and phrasings of one problem."""

    def __init__(self, rng: random.Random):
        self.rng = rng

    def pick(self, *choices: Choice) -> Choice:
        return self.rng.choice(choices)

    def of(self, choices: Sequence[Choice]) -> Choice:
        return self.rng.choice(choices)

    def number(self, low: int, high: int, step: int = 1) -> int:
        """Draw one of low, low + step, ... up to high."""
        return self.rng.randrange(low, high + 1, step)

    def people(self, count: int) -> list[Person]:
        """Draw people with different names."""
        return self.rng.sample(_PEOPLE, count)

    def person(self) -> Person:
        return self.people(1)[0]

    def thing(self) -> Thing:
        return self.of(_THINGS)

    def things(self, count: int) -> list[Thing]:
        return self.rng.sample(_THINGS, count)

    def wares(self, count: int) -> list[Thing]:
        return self.rng.sample(_WARES, count)

    def container(self) -> Thing:
        return self.of(_CONTAINERS)

    def place(self) -> str:
        return self.of(_PLACES)

    def cities(self) -> list[str]:
        return self.rng.sample(_CITIES, 2)

    def total(self) -> str:
        """A phrase for the sum."""
        return self.pick("in total", "altogether", "in all")

    def so(self) -> str:
        """A link between two steps."""
        return self.pick("So", "Therefore", "This means that", "Thus", "Hence", "It follows that")

    def first(self) -> str:
        """An opening for the first step, up to the clause."""
        return self.pick("First,", "To begin with,", "At the start,", "We see that", "We know that")


def money(cents: int) -> str:
    """Write an amount: whole dollars without cents.

    >>> money(1250), money(300)
    ('$12.50', '$3')
    """
    return f"${cents // 100}" if cents % 100 == 0 else f"${cents // 100}.{cents % 100:02d}"


def count(number: int, one: str) -> str:
    """Write a number with its unit, in the plural where it must be.

    >>> count(1, "hour"), count(3, "hour")
    ('1 hour', '3 hours')
    """
    return f"{number} {one}" if number == 1 else f"{number} {one}s"


def a(noun: str) -> str:
    """Put the indefinite article before a noun.

    >>> a("umbrella"), a("ball")
    ('an umbrella', 'a ball')
    """
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


Family = Callable[[Draw], Problem]
FAMILIES: dict[str, Family] = {}


def family(function: Family) -> Family:
    """Register a function that draws one problem, under the function's name."""

    def named(d: Draw) -> Problem:
        return dataclasses.replace(function(d), family=function.__name__)

    FAMILIES[function.__name__] = named
    return named


def solved(question: str, steps: Sequence[str], answer: float, text: str, **given: Any) -> Problem:
    """Put a problem together; `text` holds `{}` where the answer goes, unless it is complete."""
    return Problem(question, tuple(steps), answer, text.format(answer), given)
