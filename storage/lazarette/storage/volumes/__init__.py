"""Volume drivers and the manager of named volumes."""
