"""A model in one process: loaded whole, as a skeleton, or in slices of files."""
