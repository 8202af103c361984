"""Volumes kept safe: repositories, backup and restore runs, policies, host recovery."""
