"""Image-text pairs of WebDataset tar shards, read by position."""

import contextlib
import glob
import hashlib
import itertools
import json
import os
import re
import tarfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from geomreg.integrations.recipes.data.images import broken_sample, reason
from geomreg.integrations.recipes.data.sample import check_reader, loading_of, read_sample
from geomreg.integrations.recipes.data.strings import Strings, fingerprint, repeats
from geomreg.integrations.recipes.data.texts import Tokenizer

__all__ = ["TarPairs"]

_BLOCK = 1 << 20  # bytes at a time, of what follows after the end of a tar file
_OPEN = 32  # shards that a process keeps open
_FORMAT = "geomreg tar index 1"
_MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)  # as WebDataset: key, and extension from the first dot on
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstandard"}


class TarPairs(Dataset[dict[str, Any]]):
    """Image-text pairs of WebDataset tar shards as img2dataset writes them (CC3M, CC12M, LAION), at any position.

    Members whose names agree up to the first dot of the file name are one sample: ``000000012.jpg``, ``000000012.txt``,
    ``000000012.json``. Sample i is ``{"id": str, "image": transform(image), "text": (L,) int64}`` with the asked modalities only, and
    ``{"id", "broken": "<shard>/<name>: <reason>"}`` if its image or its caption is missing or cannot be decoded (images are loaded as
    by :class:`~geomreg.integrations.recipes.data.CsvPairs`), or the caption is empty. Captions are taken as written.

    **What is passed over** is counted in ``passed_over``: members with other extensions, hidden files, and names with a dot before the
    extension, as in ``22.05_cat.jpg``, whose extension is ``05_cat.jpg`` by the rule above; of these there is also a warning, unless
    there is a sample ``22`` of which they may be further images. There is one too of an archive after the end of a shard's first, which
    ``cat a.tar b.tar`` leaves there. Folders do not count.

    **Ids** are ``<shard's file name without .tar>/<name>``. Samples are in the order of the shards, and in each in the order of their
    first members.

    **Index.** The headers of all members are read once (some 20 microseconds each), and positions and sizes kept: 44 bytes a
    sample beside its id. With ``index=`` they are also kept in a file, in which shards of the same name, size and time of modification
    are looked up; the others are read again and the file replaced. A damaged file is made anew. Nothing is ever unpacked.

    Up to 32 shards stay open in each process. Reads name their position, so that forked workers and threads may share them (POSIX).

    Args:
        shards: path of a tar file, or of several with ranges ``{000000..000331}``, choices ``{train,val}`` and wildcards ``*``; or a
            list of such.
        transform: PIL image in RGB to tensor; may be None without the modality ``"image"``.
        tokenizer: as open_clip's, list of N strings to ``(N, L)`` int64; may be None without the modality ``"text"``.
        image_extensions: of members that are images; more than one such member in a sample is an error.
        caption_extension: of members that are captions, in UTF-8.
        json_key: take captions from this key of the ``.json`` members instead.
        modalities: what samples hold; a sample of ``("text",)`` needs no image, of ``("image",)`` no caption.
        strict: raise on a broken sample.
        index: ``.safetensors`` file for the index.

    Attributes:
        ids: N strings.
        groups: ``(N,)`` int32, ascending: number of each sample's shard. Shuffled shards with samples shuffled within them are read
            almost sequentially.
        shards: paths of the S shards.
        passed_over: number of members that belong to no sample, by the reason, and the first such member.
        transform, tokenizer, modalities: as given.

    Raises:
        FileNotFoundError: shards that are not there.
        ValueError: a shard that is compressed, damaged or truncated; two shards of one name; members with absolute paths or ``..``,
            links and devices; two members for one purpose in a sample; no samples; an ``index`` that is some other file; with
            ``strict`` a broken sample.
        RuntimeError: a shard that changed since it was indexed, when a sample of it is read.
        OSError: an index that cannot be written.
        TypeError: transform or tokenizer are no functions, or the tokenizer gives something else.
    """

    def __init__(
        self,
        shards: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        transform: Callable[[Image.Image], Tensor] | None,
        tokenizer: Tokenizer | None,
        image_extensions: tuple[str, ...] = ("jpg", "jpeg", "png", "webp"),
        caption_extension: str = "txt",
        json_key: str | None = None,
        modalities: tuple[str, ...] = ("image", "text"),
        strict: bool = False,
        index: str | os.PathLike[str] | None = None,
    ) -> None:
        self.modalities = check_reader("TarPairs", modalities, transform, tokenizer)
        self.transform, self.tokenizer, self.strict, self.json_key = transform, tokenizer, strict, json_key
        images = () if isinstance(image_extensions, str) else tuple(image_extensions)
        caption = caption_extension if json_key is None else "json"
        if not images or not all(
            isinstance(extension, str) and extension.strip(".") == extension != "" for extension in (*images, caption)
        ):
            raise ValueError(
                f"TarPairs: expected extensions of images and captions without a dot in front, got {image_extensions!r} and {caption!r}. "
                "Pass ('jpg', 'png') and 'txt', say."
            )
        self._extensions = (tuple(extension.lower() for extension in images), (caption.lower(),))
        self.shards = _expand(shards)
        self._stamps = [_stamp(path) for path in self.shards]
        parts = _indexed(self.shards, self._stamps, self._extensions, None if index is None else os.fspath(index))
        self.passed_over = _together(part.passed for part in parts)
        self.ids: Strings = Strings.concatenate(
            Strings.pack(f"{_name(path)}/{key}" for key in part.keys) for path, part in zip(self.shards, parts, strict=True)
        )
        self.groups = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part.keys) for part in parts])
        self._members = np.concatenate([part.members for part in parts])  # (N, 4): position and size of image and caption
        if not len(self):
            told = "".join(f"; {count} {what}, the first {name!r}" for what, (count, name) in self.passed_over.items())
            raise ValueError(
                f"TarPairs: expected images and captions in {', '.join(self.shards):.200}, got none{told}. Check the extensions."
            )
        for what, advice in _LOST.items():
            if what in self.passed_over:
                count, name = self.passed_over[what]
                warnings.warn(f"TarPairs: passed over {count} {what}, the first {name!r} {advice}.", stacklevel=2)

    def lacking(self) -> dict[str, int]:
        """Samples without a member that their modalities need: each of them is broken."""
        columns = {"image": 0, "text": 2}
        return {modality: int((self._members[:, columns[modality]] < 0).sum()) for modality in self.modalities}

    def caption(self, index: int) -> str:
        """Text of a sample; a ValueError that says why there is none."""
        return _caption(self._content(index, 1), self.json_key)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        sample_id, shard = self.ids[index], self.shards[self.groups[index]]
        where, image, caption = shard + sample_id[len(_name(shard)) :], None, ""
        try:
            if "image" in self.modalities:
                image = self._content(index, 0)
            if "text" in self.modalities:
                caption = self.caption(index)
        except (OSError, ValueError) as error:
            return broken_sample("TarPairs", sample_id, where, reason(error), strict=self.strict, what="an image and a caption")
        return read_sample(self, sample_id, where, caption, data=image)

    def _content(self, index: int, kind: int) -> bytes:
        """Of the member with the image (0) or the caption (1)."""
        position, size = self._members[index, 2 * kind : 2 * kind + 2].tolist()
        if position < 0:
            raise ValueError(f"no {' or '.join(f'.{extension}' for extension in self._extensions[kind])} member")
        shard = self.groups[index]
        return _open(self.shards[shard], *self._stamps[shard]).read(position, size)

    loading = property(loading_of)

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """For each modality a digest of the ids; for texts also of where captions come from, and of the shards' names and sizes.

        Captions are not read for it: an edit that changes neither the name nor the size of a shard goes unnoticed (tar pads members to
        512 bytes). Folders and times play no part.
        """
        shards = [part for path, (size, _) in zip(self.shards, self._stamps, strict=True) for part in (_name(path), str(size))]
        columns = {"image": (self.ids,), "text": (self.ids, shards, (*self._extensions[1], self.json_key or ""))}
        return {modality: fingerprint(*columns[modality]) for modality in self.modalities}


# shards ---------------------------------------------------------------------------------------------------------------


def _expand(shards: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[str]:
    """Absolute paths of the shards that there are."""
    patterns = [shards] if isinstance(shards, (str, os.PathLike)) else shards
    paths: list[str] = []
    missing = []
    for path in itertools.chain.from_iterable(map(_braces, map(os.fspath, patterns))):
        found = [path] if os.path.isfile(path) else sorted(filter(os.path.isfile, glob.glob(path)))
        paths.extend(map(os.path.abspath, found))
        if not found:
            missing.append(path)
    if missing or not paths:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise FileNotFoundError(
            f"TarPairs: expected tar files, got none at {shown or repr(shards)}. Check the path; {{000..331}} and * stand for several."
        )
    for row, first, _ in repeats([_name(path) for path in paths]):
        raise ValueError(f"TarPairs: expected shards of different names, got {paths[first]} and {paths[row]}. Rename or remove one.")
    return paths


def _braces(pattern: str) -> Iterator[str]:
    """Every choice of ``{first..last}`` and ``{one,another}``; as it is if there is such a file."""
    parts = [] if os.path.isfile(pattern) else re.split(r"(\{[^{}]*\})", pattern)
    choices: list[Sequence[str]] = []
    for part in parts or [pattern]:
        if match := re.fullmatch(r"\{(\d+)\.\.(\d+)\}", part):
            first, last = match.groups()
            if int(first) > int(last):
                raise ValueError(
                    f"TarPairs: expected a range of shards like {{000000..000331}}, got {part} in {pattern}. Begin with the lower."
                )
            choices.append([f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)])
        elif parts and part.startswith("{") and "," in part:
            choices.append(part[1:-1].split(","))
        else:
            choices.append([part])
    return map("".join, itertools.product(*choices))


def _name(path: str) -> str:
    return os.path.basename(path).removesuffix(".tar")


def _stamp(path: str) -> tuple[int, int]:
    """Size and time of modification: what a shard is known by."""
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns


class _Shard:
    """An open file that threads and forked processes may share: reads name their position."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)

    def read(self, position: int, size: int) -> bytes:
        return os.pread(self.descriptor, size, position)


@lru_cache(maxsize=_OPEN)
def _open(path: str, size: int, modified: int) -> _Shard:
    shard = _Shard(os.open(path, os.O_RDONLY))
    stat = os.fstat(shard.descriptor)
    if (stat.st_size, stat.st_mtime_ns) != (size, modified):
        raise RuntimeError(f"TarPairs: expected {path} as it was when its headers were read, got a newer file. Make the data set again.")
    return shard


def _caption(content: bytes, json_key: str | None) -> str:
    """The text, or a ValueError that says why there is none."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("caption that is not UTF-8") from None
    if json_key is None:
        return text
    try:
        found = json.loads(text)
    except ValueError:
        raise ValueError("member .json that is not JSON") from None
    caption = found.get(json_key) if isinstance(found, dict) else None
    if not isinstance(caption, str):
        raise ValueError(f"no text at {json_key!r} in the .json member")
    return caption


# index ----------------------------------------------------------------------------------------------------------------

_Extensions = tuple[tuple[str, ...], tuple[str, ...]]  # of images, of captions
_Known = tuple[str, int, int]  # name and stamp of a shard


class _Part(NamedTuple):
    """Samples of a shard: names, and ``(N, 4)`` position and size of the image, position and size of the caption (-1: none); and for
    each reason how many members belong to none of them, and the first."""

    keys: Strings
    members: np.ndarray
    passed: dict[str, tuple[int, str]]


DOTS = "names with a dot before their extension"
APPENDED = "archives after the end of the first"
_LOST = {  # what was surely meant to be read
    DOTS: "(a name ends at its first dot, as in WebDataset): rename them, or give the whole extension, say image_extensions=('input.jpg',)",
    APPENDED: "(tar stops at the end of the first): split the shard, or write it anew",
}
_KINDS = 16  # of other extensions that are counted apart


def _together(parts: Iterable[dict[str, tuple[int, str]]]) -> dict[str, tuple[int, str]]:
    """The counts of all shards."""
    found: dict[str, tuple[int, str]] = {}
    for part in parts:
        for what, (count, name) in part.items():
            before, first = found.get(what, (0, name))
            found[what] = before + count, first
    return found


def _indexed(shards: list[str], stamps: list[tuple[int, int]], extensions: _Extensions, index: str | None) -> list[_Part]:
    parts = {} if index is None else _load(index, extensions)
    wanted: list[_Known] = [(_name(path), *stamp) for path, stamp in zip(shards, stamps, strict=True)]
    new = [(key, path) for key, path in zip(wanted, shards, strict=True) if key not in parts]
    try:
        for key, path in tqdm(new, desc="TarPairs: headers", unit="shard", leave=False, disable=None):
            parts[key] = _scan(path, extensions)
    finally:  # what was read before a damaged shard is not read again
        if index is not None and new:
            _store(index, {key: parts[key] for key in wanted if key in parts}, extensions)
    return [parts[key] for key in wanted]


def _scan(path: str, extensions: _Extensions) -> _Part:
    rows: dict[str, list[int]] = {}
    passed: dict[str, tuple[int, str]] = {}
    dotted: list[tuple[str, str]] = []
    columns = {extension: 2 * kind for kind in (0, 1) for extension in extensions[kind]}
    for member in _members(path):
        if member is None:
            passed[APPENDED] = 1, path
            continue
        name = member.name.removeprefix("./")
        if name.startswith("/") or ".." in name.split("/"):
            raise ValueError(f"TarPairs: expected members with paths inside the archive in {path}, got {member.name!r}. Remove it.")
        if not (member.isdir() or member.isreg()) or member.issparse() or member.size < 0:
            raise ValueError(
                f"TarPairs: expected files and folders in {path}, got the member {name!r}, a link, device, or sparse file. Remove it."
            )
        match = _MEMBER.fullmatch(name)
        column = columns.get(match[2].lower()) if match and member.isreg() else None
        if column is not None:
            row = rows.setdefault(match[1], [-1, -1, -1, -1])
            if row[column] >= 0:
                what = "caption" if column else "image"
                raise ValueError(f"TarPairs: expected one {what} for each name in {path}, got a second one, {name!r}. Remove or rename it.")
            row[column : column + 2] = member.offset_data, member.size
        elif member.isreg():
            what = _why(name, columns)
            if what == DOTS and match:
                dotted.append((match[1], name))
                continue
            _count(passed, what if what in passed or len(passed) < _KINDS else "others", name)
    for key, name in dotted:
        _count(passed, "further images or captions of samples" if key in rows else DOTS, name)
    return _Part(Strings.pack(rows), np.array(list(rows.values()), np.int64).reshape(-1, 4), passed)


def _count(passed: dict[str, tuple[int, str]], what: str, name: str) -> None:
    count, first = passed.get(what, (0, name))
    passed[what] = count + 1, first


def _why(name: str, columns: Mapping[str, int]) -> str:
    """A member with this name belongs to no sample."""
    file = name.rpartition("/")[2]
    if file.startswith("."):
        return "hidden files"
    if any(file.lower().endswith(f".{extension}") for extension in columns):
        return DOTS
    return f"with the extension .{file.rpartition('.')[2].lower()}" if "." in file else "without an extension"


def _members(path: str) -> Iterator[tarfile.TarInfo | None]:
    """The members, and None where something follows after the end of the archive."""
    with open(path, "rb") as file:
        start = file.read(8)
        for magic, kind in _COMPRESSED.items():
            if start.startswith(magic):
                raise ValueError(
                    f"TarPairs: expected an uncompressed tar file, got {path}, compressed by {kind}: members of "
                    "these cannot be read by position. Decompress it."
                )
        file.seek(0)
        damage = "no blocks of zeros at its end"
        try:
            with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as archive:
                while (member := archive.next()) is not None:
                    yield member
                    archive.members.clear()  # which would hold every header
                file.seek(archive.offset)  # tarfile takes whatever is no header for the end
                if file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE):
                    if any(any(block) for block in iter(lambda: file.read(_BLOCK), b"")):
                        yield None
                    return
        except (tarfile.TarError, ValueError, OverflowError) as error:
            damage = str(error)
        raise ValueError(f"TarPairs: expected a whole tar file, got {path}, truncated or damaged ({damage}). Download it again.")


def _load(path: str, extensions: _Extensions) -> dict[_Known, _Part]:
    """What the index knows; nothing if there is none, it is damaged, or it was made for other extensions."""
    if not path.endswith(".safetensors"):
        raise ValueError(f"TarPairs: expected index as a .safetensors file, got {path}. Pass 'shards.safetensors', say.")
    if not os.path.exists(path):
        return {}
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(f"TarPairs: expected index as a file that TarPairs wrote, got {path}. Pass another path, or delete it.")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, TypeError, KeyError):  # a damaged header, too
        return {}
    if metadata.get("checksum") != _checksum(tensors, metadata) or metadata["extensions"] != json.dumps(extensions):
        return {}
    if "0.passed" not in tensors:  # of a version that did not count what is passed over
        return {}
    return {
        (name, size, modified): _Part(
            Strings.of_lengths(tensors[f"{k}.keys"].tobytes(), tensors[f"{k}.lengths"]),
            tensors[f"{k}.members"],
            {what: (count, first) for what, (count, first) in json.loads(tensors[f"{k}.passed"].tobytes()).items()},
        )
        for k, (name, size, modified) in enumerate(json.loads(metadata["shards"]))
    }


def _store(path: str, parts: dict[_Known, _Part], extensions: _Extensions) -> None:
    tensors: dict[str, np.ndarray] = {}
    for k, part in enumerate(parts.values()):
        tensors[f"{k}.keys"] = np.frombuffer(part.keys.blob, np.uint8)
        tensors[f"{k}.lengths"], tensors[f"{k}.members"] = part.keys.lengths, part.members
        tensors[f"{k}.passed"] = np.frombuffer(json.dumps(part.passed).encode(), np.uint8)
    metadata = {"format": _FORMAT, "shards": json.dumps(list(parts)), "extensions": json.dumps(extensions)}
    metadata["checksum"] = _checksum(tensors, metadata)
    temporary = f"{path}.{os.getpid()}"
    try:
        with open(temporary, "wb") as file:
            file.write(save(tensors, metadata))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"TarPairs: expected to write the index {path}, got: {error.strerror}. Pass another path, or none.") from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def _checksum(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for key in ("shards", "extensions"):
        digest.update(metadata.get(key, "").encode("utf-8", "surrogateescape"))
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tensors[name].shape}".encode())
        digest.update(np.ascontiguousarray(tensors[name]))
    return digest.hexdigest()
