from lazarette.fuse.native import Status

class Stat:
    """Attributes of a file, under the names of ``os.stat_result``."""

    st_mode: int
    st_ino: int
    st_dev: int
    st_nlink: int
    st_uid: int
    st_gid: int
    st_rdev: int
    st_size: int
    st_blocks: int
    st_blksize: int
    st_atime_ns: int
    st_mtime_ns: int
    st_ctime_ns: int

def status(folder: int | None, name: bytes, follow: bool, /) -> Stat: ...
def seek(folder: int | None, name: bytes, /) -> Stat | None: ...
def opened(descriptor: int, /) -> Stat: ...
def entry_reply(
    node: int, ino: int, st: Status, nlink: int, entry_ttl: int, attr_ttl: int, /
) -> bytes: ...
def attr_reply(ino: int, st: Status, nlink: int, ttl: int, /) -> bytes: ...
def answer(device: int, unique: int, body: bytes, /) -> None: ...
def set_times(
    folder: int | None,
    name: bytes,
    follow: bool,
    atime: int,
    atime_ns: int,
    mtime: int,
    mtime_ns: int,
    /,
) -> None: ...
