"""Getting data back before it has all arrived."""
