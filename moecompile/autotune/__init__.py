"""Candidates, measurement, store."""
