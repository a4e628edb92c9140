"""Parts that all skills share: the sample, the held-out split, and words made of syllables."""

import random
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")
HELD_OUT_SHARE = 8


class Sample(NamedTuple):
    """A conversation whose last assistant message is the reference.

    `checks.is_right` compares the answer with `expected`; `picture` holds the arguments of
    `pictures.paint`.
    """

    skill: str
    messages: list[dict[str, Any]]
    expected: Any
    thinking: bool = False
    tools: list[dict[str, Any]] | None = None
    picture: Any = None


def user(text: str) -> dict[str, Any]:
    """A message of the user."""
    return {"role": "user", "content": text}


def assistant(answer: str, thought: str = "") -> dict[str, Any]:
    """A message of the model."""
    return {"role": "assistant", "content": answer, "reasoning_content": thought}


def is_held_out(key: object) -> bool:
    """Whether `key` belongs to the eighth of all keys that is not in training."""
    return zlib.crc32(repr(key).encode()) % HELD_OUT_SHARE == 0


def draw(make: Callable[[random.Random], T], rng: random.Random, held_out: bool) -> T:
    """Draw from `make` until the value is on the wanted side of the split."""
    while is_held_out(value := make(rng)) != held_out:
        pass
    return value


FIRST_NAMES = (
    "Anna Ben Clara David Emma Felix Greta Hans Ida Jonas Kira Leo Mira Nils Olga Paul Rosa Sven "
    "Tina Urs Vera Walter Xenia Yara Adam Bella Carl Dora Erik Frida Gus Helen Ivan Jane Karl "
    "Lena Max Nora Oskar Petra Ralf Sara Tom Ulla Viktor Wanda Zoe Bruno"
).split()
LAST_NAMES = (
    "Adler Berg Cole Dahl Engel Frost Graf Hahn Irving Jung Kern Lang Moss Nagel Olsen Pike Quinn "
    "Reed Stone Tanner Unger Vogel West Young Zander Abbott Baker Cross Dunn Ellis Fox Grant Hill "
    "Ingram Jensen Keller Lund Meyer North Otto Palmer Roth Shaw Thorn Vance Wolf York Ziegler"
).split()
ADJECTIVES = (
    "silver amber brave calm clever cosmic crimson curious dusty eager early fancy fierce frozen "
    "gentle giant golden happy hidden hollow humble icy jolly lively lonely lucky mellow mighty "
    "misty noble odd pale polite proud quick rapid royal rusty secret shy silent simple sleepy "
    "smooth steady sunny tender velvet"
).split()
NOUNS = (
    "otter anchor badger basket beacon candle canyon cactus comet compass copper coral crane "
    "dagger dragon eagle ember falcon feather forest galaxy garden glacier hammer harbor hazel "
    "island jacket jungle kettle ladder lantern lemon magnet maple marble meadow mirror needle "
    "ocean orchid panda pepper planet rocket saddle tiger walnut"
).split()


def code_word(rng: random.Random, held_out: bool) -> str:
    """A pair of words such as "silver-otter", on its side of the split."""
    return draw(lambda r: f"{r.choice(ADJECTIVES)}-{r.choice(NOUNS)}", rng, held_out)


def name(rng: random.Random, held_out: bool) -> str:
    """A full name such as "Mira Berg", on its side of the split."""
    return draw(lambda r: f"{r.choice(FIRST_NAMES)} {r.choice(LAST_NAMES)}", rng, held_out)
