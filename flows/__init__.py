"""The flow and its tasks: policy only (caching, retries, logs), and the one place with Prefect."""
