"""Rows from their source to packed tokens."""
