"""Images: content-addressed store, registries, load and save."""
