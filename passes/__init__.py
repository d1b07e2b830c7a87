"""Passes and recognition rules: one file each, found by listing the folder."""
