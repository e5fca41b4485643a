"""Decisions: what to run where. Nothing here imports torch."""
