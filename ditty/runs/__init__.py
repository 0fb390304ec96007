"""A run on disk: its directory, its progress, and what can be seen of it."""
