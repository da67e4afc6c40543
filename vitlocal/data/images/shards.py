"""Finds the parquet shards of a split by their names, as Hugging Face names them.

The rules follow https://huggingface.co/docs/hub/datasets-file-names-and-splits, but names of splits must be whole:
train_mini is another split than train.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from vitlocal.data.images.image_set import SPLIT_NAMES, SourceChoice, listed, scan_folder
from vitlocal.data.images.listing import entry_kind
from vitlocal.errors import ConfigError

DEPTH = 3  # folders below the source, such as data/cifar100/train/
MOST_FOLDERS = 100  # a folder with more has classes of photos in it, not shards

_SPLITS = {name: split for split, names in SPLIT_NAMES.items() for name in names} | {
    "dev": "val",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
_OF = re.compile(r"(?P<name>.*?)[-_. ]?(?P<number>\d+)[-_]of[-_](?P<of>\d+)(?:[-_.].*)?")  # a digest may follow
_PLAIN = re.compile(r"(?:(?P<name>.*)[-_. ])?(?P<number>\d+)")


class Shard(NamedTuple):
    path: str  # relative to the source
    split: str  # our name of it, if `known`, else the name that was found
    known: bool
    configuration: str  # '': the shards lie in no folder of a configuration
    word: str  # the split's name in the file's name; '': the split is the name of a folder
    name: str  # the rest of the file's name, without its number
    number: str
    of: int | None
    partial: bool  # Hugging Face converts only a part of large data sets, and calls it partial-train


class Shards(NamedTuple):
    """The shards of a split, in order."""

    paths: list[str]  # relative to the source
    split: str  # the split that they are of: 'test' may stand in for 'val'
    words: str  # the same, for messages
    reads: tuple[str, ...]
    left_out: dict[str, int]
    notes: tuple[str, ...]


def has_shards(root: Path) -> bool:
    return any(shard.known or shard.word for shard in _all_shards(root))


def find_shards(root: Path, split: str, choice: SourceChoice) -> Shards | None:
    """The shards of a split; None if there are none, also none of 'test' for 'val'.

    Raises ConfigError if several configurations could be meant, or if shards are missing or present twice.
    """
    shards = _all_shards(root)
    configuration = _configuration(root, {shard.configuration for shard in shards if shard.known}, choice.subset)
    mine = [shard for shard in shards if shard.configuration == configuration]
    found = {name: [s for s in mine if s.known and s.split == name] for name in (split, "test")}
    taken = split if found[split] or split != "val" else "test"
    if not found[taken]:
        return None
    whole = [shard for shard in found[taken] if not shard.partial]
    paths = _checked(root, taken, whole or found[taken])
    others = [shard for shard in mine if not shard.known]
    elsewhere = [shard for shard in shards if shard.known and shard.configuration != configuration]
    left_out = {
        f"parquet shards of other {kind} ({', '.join(sorted(set(names)))})": len(names)
        for kind, names in (
            ("splits", [shard.split for shard in others]),
            ("configurations", [shard.configuration or "default" for shard in elsewhere]),
        )
        if names
    }
    more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    reads = (f"configuration: '{configuration}'",) * bool(configuration) + (f"shards: {paths[0]}{more}",)
    notes = []
    if taken != split:
        notes.append(f"there are no shards of a split 'validation', so '{split}' reads those of '{taken}'")
    if not whole:
        notes.append(f"'{Path(paths[0]).parent.name}' has only a part of the split, which Hugging Face converted")
    words = f"split '{taken}'" + (", which is read because there is no validation split," if taken != split else "")
    return Shards(paths, taken, words, reads, left_out, tuple(notes))


def missing_split(root: Path, split: str) -> ConfigError:
    found = sorted({shard.split for shard in _all_shards(root)})
    return ConfigError(
        f"source '{root}' has no split '{split}': expected shards named {split}-00000-of-….parquet, "
        f"found {listed(found)}; rename or download them"
    )


def _configuration(root: Path, names: set[str], chosen: str | None) -> str:
    shown = f"source '{root}' has shards of {len(names)} configurations: {listed(sorted(names), 20)}"
    if chosen is not None:
        if chosen in names:
            return chosen
        if chosen == "default" and "" in names:
            return ""
        raise ConfigError(f"--subset {chosen}: {shown}; choose one of them")
    for usual in ("", "default"):
        if usual in names:
            return usual
    if len(names) > 1:
        raise ConfigError(f"{shown}; choose one with --subset NAME")
    return next(iter(names), "")


def _checked(root: Path, split: str, shards: list[Shard]) -> list[str]:
    """The paths of a split's shards, each once. ConfigError if some are missing or of another version."""
    where = f"source '{root}', split '{split}'"
    series: dict[tuple[str, str, int | None, bool], dict[str, Shard]] = {}
    for shard in shards:
        key = (shard.word, shard.name, shard.of, bool(shard.number))
        same = series.setdefault(key, {}).setdefault(shard.number and str(int(shard.number)), shard)
        if same is shard:
            continue
        sizes = [os.path.getsize(root / path) for path in (same.path, shard.path)]
        # A copy in another folder, such as data/, is read once.
        if sizes[0] != sizes[1] or os.path.dirname(same.path) == os.path.dirname(shard.path):
            raise ConfigError(f"{where}: {same.path} and {shard.path} are the same shard; remove one")
    firsts = [next(iter(numbered.values())) for numbered in series.values()]
    named = len({(shard.word, shard.name) for shard in firsts})
    if len(series) > 1 and (any(shard.word for shard in firsts) or named < len(series)):
        raise ConfigError(
            f"{where}: the shards belong to {len(series)} different sets: {listed([s.path for s in firsts])}; remove "
            "those that are of another version or another split"
        )
    for first, numbered in zip(firsts, series.values(), strict=True):
        if first.number:
            _require_all_numbers(where, first, {int(number) for number in numbered})
    return [
        numbered[number].path
        for numbered in series.values()
        for number in sorted(numbered, key=lambda number: int(number or 0))
    ]


def _require_all_numbers(where: str, first: Shard, numbers: set[int]) -> None:
    base = 0 if 0 in numbers or (first.of is not None and first.of not in numbers) else 1
    end = max(numbers) + 1 if first.of is None else first.of + base
    count = end - base - len(numbers)
    if count and numbers <= set(range(base, end)):
        width = len(first.number)
        missing = islice((f"{number:0{width}}" for number in range(base, end) if number not in numbers), 6)
        more = f" and {count - 6} more" if count > 6 else ""
        raise ConfigError(
            f"{where}: of the shards like {first.path}, {', '.join(missing)}{more} {'are' if count > 1 else 'is'} "
            "missing; download them, because a part of a split is not written"
        )
    if numbers - set(range(base, end)):
        raise ConfigError(f"{where}: there are shards above {first.of}, as in {first.path}; remove or rename them")


def _all_shards(root: Path) -> list[Shard]:
    return [_parsed(path) for path in sorted(_files(root), key=lambda path: (path.count("/"), path))]


def _files(root: Path, below: str = "", depth: int = DEPTH) -> Iterator[str]:
    folders = []
    for entry in scan_folder(root / below) if not below or os.access(root / below, os.R_OK) else ():  # lost+found
        path = f"{below}/{entry.name}".lstrip("/")
        if entry.name.startswith("."):
            continue
        if (kind := entry_kind(entry)) == "folder":
            folders.append(path)
        elif kind == "file" and entry.name.lower().endswith(".parquet") and entry.name.lower() != "metadata.parquet":
            yield path
    if depth and len(folders) <= MOST_FOLDERS:
        for folder in folders:
            yield from _files(root, folder, depth - 1)


def _parsed(path: str) -> Shard:
    *folders, stem = (re.sub(r"\.parquet$", "", part, flags=re.I) for part in path.split("/"))
    match = _OF.fullmatch(stem) or _PLAIN.fullmatch(stem)
    name, number = (match["name"] or "", match["number"]) if match else (stem, "")
    of = int(match["of"]) if match and match.re is _OF else None
    folders = [folder for folder in folders if folder.lower() != "data"]
    prefix, split, word = _split_in(name)
    if not word:  # the folder names the split
        named = [k for k, folder in enumerate(folders) if _split_in(folder)[2]]
        if not named:
            return Shard(path, name or path, False, "/".join(folders), "", name, number, of, False)
        prefix, split, _ = _split_in(folders.pop(named[-1]))
    elif folders and _split_in(folders[-1])[:2] == ("", split):
        folders.pop()  # train/train-0000.parquet
    partial = prefix.lower() == "partial"
    folders += [prefix] if prefix and not partial else []
    return Shard(path, split, split in SPLIT_NAMES, "/".join(folders), word, "" if word else name, number, of, partial)


def _split_in(name: str) -> tuple[str, str, str]:
    """What precedes the split in a name, the split, and its word: ('imagenet-1k', 'train', 'train').

    A name such as train_mini or validation_v2 is a split of its own. The word is '' if there is no split in the name.
    """
    words = re.split(r"[-_. ]", name.lower())
    if Counter(word in _SPLITS for word in words)[True] == 1 and words[-1] in _SPLITS:
        return name[: -len(words[-1])].rstrip("-_. "), _SPLITS[words[-1]], words[-1]
    return "", name, name if any(word in _SPLITS for word in words) else ""
