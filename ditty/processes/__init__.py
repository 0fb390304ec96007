"""Starting a stage in processes of its own, and leaving none behind."""
