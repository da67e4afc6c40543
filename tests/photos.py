"""Real photos, if available: VITLOCAL_REALDATA names a folder that holds imagenet-photos-500.tar.

The archive has photos of ImageNet in a folder for each class (CLASS/NAME.JPEG, perhaps within others); some are enough.
"""

import os
import tarfile
from pathlib import Path

PHOTOS = Path(os.environ.get("VITLOCAL_REALDATA", "")) / "imagenet-photos-500.tar"


def unpack_photos(out: Path, count: int) -> Path:
    """Unpacks ``count`` photos to ``out`` as SPLIT/CLASS/NAME, the same ones in both splits. Returns ``out``."""
    with tarfile.open(PHOTOS) as archive:
        members = [member for member in archive if member.isfile() and member.name.lower().endswith((".jpeg", ".jpg"))]
        for member in members[:: max(1, len(members) // count)][:count]:
            for split in ("train", "val"):
                path = out / split / Path(member.name).parent.name / Path(member.name).name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archive.extractfile(member).read())
    return out
