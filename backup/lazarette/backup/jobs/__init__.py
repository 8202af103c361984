"""One process a backup, restore or check: it may be killed, and be found again."""
