"""Where bytes are safe: the repository, its stores, policies and recovery."""
