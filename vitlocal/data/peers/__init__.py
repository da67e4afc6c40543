"""Other loaders, to swap in and to compare with."""
