"""Modules composed at random from the parts of tests.models: python -m tests.fuzz."""
