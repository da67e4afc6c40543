"""What a run folder shows: its log, figures, and a page that compares runs. It imports nothing from ``train``."""
