Inode = tuple[bytes | None, int, int, int, int, int, int, int, int, int, int, int, int, int]

def scan(directory: int, /) -> list[Inode]: ...
def read_files(
    files: list[tuple[int, bytes, int]], /
) -> list[tuple[int, Inode | None, bytes | None, int, int]]: ...
def write_files(
    files: list[tuple[int, bytes, bytes | bytearray | memoryview, int, int, int, int, int]],
    /,
) -> list[tuple[int, int]]: ...
def cuts(
    data: bytes | bytearray | memoryview,
    table: bytes,
    least: int,
    average: int,
    most: int,
    strict: int,
    loose: int,
    final: bool,
    /,
) -> list[int]: ...
def hashes(data: list[bytes | bytearray | memoryview], key: bytes, /) -> bytes: ...
def page_hashes(pages: bytes | bytearray | memoryview, key: bytes, /) -> bytes: ...
def read_pages(
    file: int,
    ranges: list[tuple[int, int]],
    into: bytearray | memoryview,
    key: bytes,
    /,
) -> bytes | None: ...
def keep_memory() -> None: ...
