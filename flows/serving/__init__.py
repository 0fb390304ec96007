"""Prefect itself: the local server, deployments, automations."""
