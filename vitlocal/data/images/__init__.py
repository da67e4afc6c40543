"""Image sources: class folders, the ILSVRC2012 tars, parquet shards, torchvision's data sets, the built-in sample.

``open_images`` detects the kind of a source. Each kind is an ``ImageSet``: it knows all labels without decoding, reads
any row at random, and can be pickled to worker processes, which open its files again.
"""

from vitlocal.data.images.find import open_images, resolve_source
from vitlocal.data.images.image_set import ImageSet, SourceChoice
from vitlocal.data.images.pixels import decode_rgb

__all__ = ["ImageSet", "SourceChoice", "decode_rgb", "open_images", "resolve_source"]
