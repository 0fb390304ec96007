"""What `ditty deploy` puts on a Prefect server (prefect.yaml), and example specs."""
