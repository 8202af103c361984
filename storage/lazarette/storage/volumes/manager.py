"""Named volumes over all drivers: records, users, and operations that survive a crash.

The manager is what the engine and the backup service talk to.  It keeps one record a
volume in the state database, counts who has a volume mounted by the caller's id (case
A35), serialises operations on one volume, and writes ahead what it is about to do.
"""

from __future__ import annotations
