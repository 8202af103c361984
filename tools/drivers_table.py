"""Write ``docs/drivers.md`` from what the drivers say of themselves.

    .venv/bin/python tools/drivers_table.py [--check]

With ``--check`` nothing is written; it fails when the file is not what would be written.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lazarette.storage import mounts, registry
from lazarette.storage.clock import SystemClock
from lazarette.storage.layers.contract import LayerCapabilities
from lazarette.storage.volumes.contract import VolumeCapabilities

TARGET = Path(__file__).parent.parent / "docs" / "drivers.md"

HEAD = """# Storage drivers

This file is made by `tools/drivers_table.py` from the drivers' own capabilities; the numbers
behind the default are in [decisions/0101-default-drivers.md](decisions/0101-default-drivers.md).

A *layer driver* keeps image layers and the root folders of containers, a *volume driver*
named volumes. `auto` takes the first driver of the lists below that works on the host; `info`
says which one that is and why. Volumes of databases are the exception: `overlay` comes first
for them, unless the data root is on btrfs. They are told by the image of the container they are
made for, or by where it sees them, as `/var/lib/postgresql/data`; a volume made before its
container changes over when that is made, if nobody has used it. `laz volume inspect` shows the
driver under `Status`. Every driver passes one suite per family: `tests/conformance/layers` and
`tests/conformance/volumes`.
"""

WORDS = """
## What the words mean

- **atomic**: a snapshot is one instant by itself; writers wait only for its commit.
- **gated**: writers are held (containers frozen) while the snapshot is finished, and the pause
  is measured and reported with it. A volume with a `size` on `overlay` or `fuse` needs no gate:
  its own filesystem is frozen, whoever writes, and its snapshots are atomic. The pause of a
  volume without one grows by about 1 ms a thousand files, and snapshots, their removal and
  their comparison cost some 20 to 100 µs a file each; on btrfs none of this depends on the
  number of files.
- **unsafe**: as gated, but programs outside containers may write meanwhile; the snapshot is
  labelled so and a backup of it as well.
- **changed extents**: changed byte ranges come from the filesystem's own trees, nothing is read.
- **changed files**: both snapshots are compared; of files that are in both only the extents are
  read that they do not share.
- **pool file**: what btrfs, or xfs for `overlay` and `fuse`, lies in on a host whose filesystem
  cannot do what the driver needs. It grows before it is short, and promises only what the host
  has: when others fill the host a btrfs pool shrinks and an xfs pool holds room back, so that an
  application meets ENOSPC. It needs at least 512 MiB, and 512 MiB besides.
- **remapped users**: containers whose users are others on the host (`lazd --userns-remap`).
  Every volume driver has them; in a `bind` volume owners stay the host's.
- On the xfs under `overlay` and `fuse` a symbolic link's target is at most 1,023 bytes long.
- A change record that is lost or doubtful leads to a full comparison, never to a block left out.

## Options

| option | drivers | meaning |
|---|---|---|
| `size` | overlay, btrfs, fuse, tmpfs | limit, as `512m` or `10g`; can be changed while mounted |
| `nodatacow` | btrfs | write in place: no checksums, no compression, faster random writes |
| `compression` | btrfs | `none`, `zlib`, `lzo` or `zstd` |
| `device` | bind | the host's folder |
| `uid`, `gid`, `mode` | tmpfs | of the root folder |
| `type`, `o` | bind, tmpfs | as Docker's local driver takes them |

Encryption at rest is offered by none of them: put the data root on dm-crypt. Asking for it is
refused with the list of valid options.

On btrfs a limit counts what the volume itself wrote and snapshots still hold; so that a
snapshot never forbids overwriting, the limit in force grows by what was charged at the last
one. On overlay and fuse a volume with a size lies in a filesystem of its own, kept in a file:
at least 16 MiB, writes cost more than in a volume without size, it can grow but not shrink, and
snapshots do not count against it. See
[decisions/0102-size-limits.md](decisions/0102-size-limits.md).
"""


def _layers() -> Iterator[LayerCapabilities]:
    with tempfile.TemporaryDirectory(prefix="laz-table-") as folder:
        for name, make in registry.LAYERS.items():
            own = Path(folder) / name
            own.mkdir()
            driver = make(own, SystemClock())
            yield driver.capabilities
            driver.close()
        assert not mounts.mounts_beneath(folder)


def _volumes() -> Iterator[VolumeCapabilities]:
    with tempfile.TemporaryDirectory(prefix="laz-table-") as folder:
        for name, make in registry.VOLUMES.items():
            driver = make(Path(folder) / name, SystemClock())
            yield driver.capabilities
            driver.close()
        assert not mounts.mounts_beneath(folder)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _resize(one: VolumeCapabilities) -> str:
    return {
        (True, True): "grow and shrink, mounted",
        (True, False): "grow, mounted",
        (False, False): "no",
    }[one.resize_grow, one.resize_shrink]


def _clone(one: VolumeCapabilities) -> str:
    if not one.clone:
        return "into another driver"
    return "constant time" if one.clone_constant_time else "copy, by reflink where possible"


def render() -> str:
    """The whole document."""
    lines = [HEAD, "## Layer drivers, in order of preference", ""]
    lines += [
        "| driver | a new layer costs no copy | renaming a folder of a lower layer "
        "| remapped users | needs |",
        "|---|---|---|---|---|",
    ]
    for layer in _layers():
        rename = "works" if layer.directory_rename else "EXDEV (mv copies)"
        needs = ", ".join(layer.needs) or "nothing"
        cells = (
            f"`{layer.name}`",
            _yes(layer.copy_on_write),
            rename,
            _yes(layer.maps_owners),
            needs,
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## Volume drivers, in order of preference", ""]
    lines += [
        "| driver | snapshot | clone | size limit | rollback | changes | options | needs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in _volumes():
        options = ", ".join(f"`{option}`" for option in one.options) or "none"
        cells = (
            f"`{one.name}`",
            one.snapshot.value,
            _clone(one),
            _resize(one),
            _yes(one.rollback),
            one.changes.value,
            options,
            ", ".join(one.needs) or "nothing",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n" + WORDS


def main() -> int:
    """Write or check the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true")
    wanted = render()
    if not parser.parse_args().check:
        TARGET.write_text(wanted)
        return 0
    if TARGET.read_text() != wanted:
        print("docs/drivers.md is stale: run tools/drivers_table.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
