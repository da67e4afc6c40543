"""A run, or several, on one page: figures and tables."""
