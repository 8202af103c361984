"""What the installed programs call: an interrupt while libraries load ends them quietly."""

from __future__ import annotations

import signal

from lazarette.storage.garbage import collect_seldom


def main() -> None:
    """``laz``."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    collect_seldom()
    from lazarette.runtime.cli.main import main as run

    signal.signal(signal.SIGINT, before)
    run()


def daemon() -> None:
    """``lazd``."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    from lazarette.runtime.daemon import main as run

    signal.signal(signal.SIGINT, before)
    run()
