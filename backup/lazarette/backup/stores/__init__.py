"""Object stores a repository can live in."""
