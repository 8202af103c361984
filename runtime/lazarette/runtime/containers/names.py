"""Names of containers: checked, and made up when none is given."""

from __future__ import annotations

import re
import secrets
from collections.abc import Container as Collection

from lazarette.storage.errors import InvalidArgument

_NAME = re.compile(r"/?[a-zA-Z0-9][a-zA-Z0-9_.-]+")

_MOODS_TEXT = """
able amber ample apt bold brave breezy bright brisk calm candid cheerful civil clear clever cool
cosy crisp curious daring deft eager early easy elegant fair fancy fearless festive fine firm
fleet fond frank fresh friendly gentle glad golden grand hardy hearty honest hopeful jolly keen
kind lively loyal lucid lucky mellow merry mild modest neat nimble noble patient placid plucky
polite proud quick quiet ready rosy serene sharp silent sincere sleek smart snug solid steady
sunny swift tender tidy tranquil trusty upbeat vivid warm wise witty young zesty
"""
_MOODS = tuple(_MOODS_TEXT.split())
_PEOPLE_TEXT = """
abel ampere archimedes avicenna babbage banach boole bose cantor cauchy cerf chandrasekhar
clarke curie dijkstra dirac euclid euler faraday fermat fermi feynman fourier franklin galileo
galois gauss germain godel goodall hamilton hawking hertz hilbert hodgkin hopper hypatia jackson
johnson joliot kapitsa kepler knuth kovalevskaya lagrange lamarr laplace leakey leavitt lovelace
maxwell mccarthy meitner mendel mirzakhani newton noether pascal pasteur pauling perlman planck
poincare ptolemy ramanujan rosalind rubin sagan shannon sinoussi snow tesla thompson torvalds
turing vaughan volta wiles wilson wing wu yalow
"""
_PEOPLE = tuple(_PEOPLE_TEXT.split())


def check_name(name: str) -> str:
    """The name without its leading slash.

    Raises:
        InvalidArgument: characters that are not allowed.
    """
    if not _NAME.fullmatch(name):
        raise InvalidArgument(
            f"Invalid container name ({name}), only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed"
        )
    return name.removeprefix("/")


def make_name(taken: Collection[str]) -> str:
    """A free name such as ``calm_noether``."""
    while True:
        name = f"{secrets.choice(_MOODS)}_{secrets.choice(_PEOPLE)}"
        if name not in taken:
            return name
        name += str(secrets.randbelow(1000))
        if name not in taken:
            return name
