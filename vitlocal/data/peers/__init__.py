"""Loaders of other projects as sources, to use instead of the native loader or to compare with it."""
