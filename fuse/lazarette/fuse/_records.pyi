import mmap

class Region:
    """Records behind a head that one store moves."""

    def __init__(
        self, data: mmap.mmap | bytearray, words: memoryview, word: int, start: int, length: int, /
    ) -> None: ...
    def one(self, kind: int, number: int, /) -> None: ...
    def pair(self, kind: int, first: int, second: int, /) -> None: ...
    def text(self, kind: int, number: int, body: bytes, /) -> None: ...
    def file(
        self,
        number: int,
        ino: int,
        lookups: int,
        kind: int,
        flags: int,
        backing: int,
        backing_flags: int,
        device: int,
        real: int,
        orphan: int,
        parent: int,
        name: bytes,
        /,
    ) -> None: ...
    def handle(self, number: int, node: int, flags: int, fd: int, through: bool, /) -> None: ...
    def put(self, record: bytes, /) -> None: ...
    def commit(self, /) -> bool: ...
    def close(self, /) -> None: ...
