"""Listings keep their order while entries come and go."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lazarette.fuse.nodes import Listing


def names(listing: Listing, after: int = 0) -> list[bytes]:
    found: list[bytes] = []
    while chunk := listing.after(after):
        found.extend(name for _, (name, _, _) in chunk)
        after = chunk[-1][0]
    return found


def test_entries_keep_their_numbers() -> None:
    listing, other = Listing(), Listing()
    for name in (b"a", b"b", b"c"):
        listing.put(name, 1, 8)
    for name in (b"x", b"c", b"b", b"a"):
        other.put(name, 1, 8)  # another server reads the folder in another order
    other.drop(b"x")
    assert listing.after(0) == other.after(0)
    first, *rest = names(listing)
    position = listing.after(0)[0][0]
    for again in (rest[0], first):
        listing.drop(again)
        listing.put(again, 9, 4)
    assert names(listing, position) == rest
    assert names(listing) == [first, *rest]
    assert listing.after(0)[0][1] == (first, 9, 4)
    listing.drop(first)
    assert first not in listing and len(listing) == 2


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 200)), max_size=600), st.integers(1, 50))
def test_a_reader_sees_what_stays_exactly_once(changes: list[tuple[bool, int]], pace: int) -> None:
    listing = Listing()
    stays = {b"stay%d" % number for number in range(100)}
    for name in sorted(stays):
        listing.put(name, 1, 8)
    seen: list[bytes] = []
    position = 0
    for index, (add, number) in enumerate(changes):
        if add:
            listing.put(b"n%d" % number, 1, 8)
        else:
            listing.drop(b"n%d" % number)
        if index % pace == 0 and (chunk := listing.after(position)):
            position = chunk[0][0]
            seen.append(chunk[0][1][0])
    seen.extend(names(listing, position))
    assert sorted(name for name in seen if name in stays) == sorted(stays)
