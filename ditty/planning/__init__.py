"""Before a run: what it will do, whether it can, and what fits in memory."""
