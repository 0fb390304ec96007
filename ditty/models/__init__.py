"""A model in one process: loaded whole, as a skeleton, in slices of files; written in pieces."""
