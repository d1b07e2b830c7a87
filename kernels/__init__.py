"""Device code and its launch."""
