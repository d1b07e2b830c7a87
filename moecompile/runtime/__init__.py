"""What happens at a call: dispatch, fallback, layouts."""
