"""Containers: their definition, OCI runtime, monitor, logs and life."""
