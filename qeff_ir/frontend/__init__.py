"""The frontend: an unmodified transformers model becomes a `Module`, without loading a weight."""
