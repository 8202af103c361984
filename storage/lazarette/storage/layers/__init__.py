"""Layer drivers: image layers and container root filesystems."""
