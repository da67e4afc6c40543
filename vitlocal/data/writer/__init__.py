"""Writes a split of a data set into .beton files."""
