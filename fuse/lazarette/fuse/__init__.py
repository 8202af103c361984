"""Filesystems in user space; knows files, nothing of volumes or backups."""
