"""The spec: its keys, what they may be, which go together, and reading it."""
