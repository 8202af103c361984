"""The command line laz, one module per command group."""
