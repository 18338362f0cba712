"""Policies: pure functions from sites to groups of layers that share one index."""
