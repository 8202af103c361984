"""What several suites share: servers, daemons, trees, leak checks."""
