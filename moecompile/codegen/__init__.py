"""From a spec to source text to a loaded kernel."""
