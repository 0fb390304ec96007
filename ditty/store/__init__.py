"""Where things are kept: files written durably, committed directories, remotes."""
