"""What became of a run: models handed on, compared, traced and checked."""
