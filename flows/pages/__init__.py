"""What Prefect shows of a run: its report, data, costs."""
