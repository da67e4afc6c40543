"""Measurements: each writes one JSON that says what was measured, where, with what, and by which command."""
