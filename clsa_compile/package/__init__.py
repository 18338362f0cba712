"""Packages: a model compiled ahead of time, in one file that is verified before torch reads it."""
