"""Base models: which one is meant, and where its files are."""
