"""What a person and their tools talk to: the engine, its API and its command line."""
