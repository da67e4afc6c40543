"""Reads run folders, and draws figures and a page that compares runs. It imports nothing from ``train``."""
