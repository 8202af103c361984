"""Protection: what is saved when, how still it is held, what is kept, and who is told."""
