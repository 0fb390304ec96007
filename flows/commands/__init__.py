"""The `ditty` command and what it prints."""
