"""Tests. numeric and fuzz compare numbers with eager and float64; models holds what they compile."""
