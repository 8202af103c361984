"""The job process: ``python -m lazarette.backup.jobs FOLDER``, its request on stdin."""

from __future__ import annotations

from lazarette.storage.garbage import collect_seldom

if __name__ == "__main__":
    collect_seldom()
    from lazarette.backup.jobs.run import main

    main()
