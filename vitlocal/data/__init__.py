"""From photos to batches: reading, writing, decoding and augmenting images."""
