"""Numbers: every form, kernel and whole model against eager and float64."""
