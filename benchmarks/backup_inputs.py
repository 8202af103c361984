"""Inputs of the backup benchmark, the same bytes on every machine for a seed.

``pages``: files of 8 KiB pages as a database keeps them: rows of text and numbers, half of
each page compressible, files of up to 1 GiB.  ``big``: half incompressible, half log lines.
``small``: many small files in a tree as of sources.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

PAGE = 8192
_WORDS = [f"{n:x}{chr(97 + n % 26)}" for n in range(5000)]


def _page(chance: random.Random, number: int) -> bytes:
    rows = b"".join(
        b"%010d|%08x|%s\n" % (number * 50 + row, chance.getrandbits(32), b"." * 40)
        for row in range(40)
    )
    return (b"LAZPAGE\0" + number.to_bytes(8, "little") + rows + chance.randbytes(1600)).ljust(
        PAGE, b"\0"
    )[:PAGE]


def pages(folder: Path, size: int) -> None:
    """A database of about ``size`` bytes."""
    chance = random.Random(1)
    (folder / "base").mkdir(parents=True)
    number = 0
    file = 0
    while size > 0:
        length = min(size, 256 << 20)
        with open(folder / "base" / str(16384 + file), "wb") as out:
            for _ in range(length // PAGE):
                out.write(_page(chance, number))
                number += 1
        size -= length
        file += 1
    (folder / "PG_VERSION").write_text("15\n")


def touch_pages(folder: Path, share: float, seed: int) -> list[tuple[str, int]]:
    """Write over a share of the pages; returns file and offset of each."""
    chance = random.Random(seed)
    touched = []
    for path in sorted((folder / "base").iterdir()):
        count = path.stat().st_size // PAGE
        with open(path, "r+b") as file:
            for number in sorted(chance.sample(range(count), int(count * share))):
                file.seek(number * PAGE + 100)
                file.write(chance.randbytes(200))
                touched.append((f"base/{path.name}", number * PAGE))
    return touched


def differences(before: Path, after: Path) -> list[tuple[int, int]]:
    """Offset and length of runs of pages that differ between two states of a file."""
    found: list[tuple[int, int]] = []
    with open(before, "rb") as one, open(after, "rb") as other:
        at = 0
        while page := other.read(PAGE):
            if one.read(PAGE) != page:
                if found and sum(found[-1]) == at:
                    found[-1] = (found[-1][0], at - found[-1][0] + len(page))
                else:
                    found.append((at, len(page)))
            at += len(page)
    return found


def big(folder: Path, size: int) -> None:
    """Large files, half of the bytes incompressible."""
    folder.mkdir(parents=True)
    chance = random.Random(2)
    for number in range(4):
        with open(folder / f"random{number}.bin", "wb") as out:
            for _ in range(size // 8 >> 20):
                out.write(chance.randbytes(1 << 20))
        with open(folder / f"log{number}.txt", "wb") as out:
            while out.tell() < size // 8:
                lines = (
                    f"{chance.random():.6f} host{chance.randrange(40)} "
                    f"{' '.join(chance.choices(_WORDS, k=12))}\n"
                    for _ in range(5000)
                )
                out.write("".join(lines).encode())


def small(folder: Path, files: int) -> None:
    """Small files of a few KiB in directories of 50."""
    chance = random.Random(3)
    for number in range(files):
        below = folder / f"d{number // 2500}" / f"d{number // 50}"
        if number % 50 == 0:
            below.mkdir(parents=True)
        words = " ".join(chance.choices(_WORDS, k=chance.randrange(20, 2400)))
        (below / f"f{number}.txt").write_text(words)


def main() -> None:
    """``backup_inputs.py FOLDER MIB FILES``."""
    root = Path(sys.argv[1])
    mib, files = int(sys.argv[2]), int(sys.argv[3])
    pages(root / "pages", mib << 20)
    big(root / "big", mib << 20)
    small(root / "small", files)


if __name__ == "__main__":
    main()
