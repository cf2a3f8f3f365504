"""Pairs of tar shards: the same samples as loose files, patterns, the index and its file, and members that are refused."""

import io
import json
import os
import pickle
import shutil
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save, save_file
from samples import forbidden, to_tensor, tokenize, untokenize
from torch.utils.data import DataLoader

from geomreg.integrations.recipes.data import CsvPairs, TarPairs, collate
from geomreg.integrations.recipes.data import tar as module


def png(color: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (color, 255 - color, 0)).save(file, "PNG")
    return file.getvalue()


def write(path: Path, members: dict[str, bytes | str], *, kind: bytes = tarfile.REGTYPE, **more) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", encoding="utf-8", errors="surrogateescape", **more) as archive:
        add(archive, members, kind)
    return path


def add(archive, members, kind=tarfile.REGTYPE):
    for name, content in members.items():
        content = content.encode() if isinstance(content, str) else content
        header = tarfile.TarInfo(name)
        header.type, header.size = kind, len(content)
        archive.addfile(header, io.BytesIO(content))


def shard(number: int, samples: int = 4) -> dict[str, bytes | str]:
    """As img2dataset writes it."""
    members: dict[str, bytes | str] = {}
    for k in range(samples):
        key = f"{number:05d}{k:04d}"
        members |= {
            f"{key}.jpg": png(40 * number + k),
            f"{key}.txt": f"größe {number}.{k}",
            f"{key}.json": json.dumps({"alt": f"alt {k}"}),
        }
    return members


@pytest.fixture
def folder(tmp_path):
    for number in range(3):
        write(tmp_path / "shards" / f"{number:05d}.tar", shard(number))
    return tmp_path / "shards"


def read(shards, **more) -> TarPairs:
    return TarPairs(shards, **{"transform": to_tensor, "tokenizer": tokenize} | more)


IDS = [f"{number:05d}/{number:05d}{k:04d}" for number in range(3) for k in range(4)]


def equal(one, two) -> bool:
    return one.keys() == two.keys() and all(
        torch.equal(one[key], two[key]) if torch.is_tensor(one[key]) else one[key] == two[key] for key in one
    )


def test_same_samples_as_loose_files(folder, tmp_path):
    rows = []
    for name in IDS:
        for extension in ("jpg", "txt"):
            with tarfile.open(folder / f"{name[:5]}.tar") as archive:
                path = tmp_path / "loose" / f"{name}.{extension}"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archive.extractfile(f"{name[6:]}.{extension}").read())
        rows.append(f"{name}\t{name}.jpg\t{path.read_text()}\n")
    (tmp_path / "loose" / "list.tsv").write_text("id\timage\tcaption\n" + "".join(rows))
    loose = CsvPairs(tmp_path / "loose" / "list.tsv", transform=to_tensor, tokenizer=tokenize)
    data = read(folder / "*.tar")
    assert list(data.ids) == list(loose.ids) == IDS
    assert len(data) == 12
    assert all(equal(one, two) for one, two in zip(data, loose, strict=True))
    assert untokenize(data[5]["text"]) == "größe 1.1"
    assert equal(data[-1], data[11])
    for index in (12, -13):
        with pytest.raises(IndexError):
            data[index]


def test_attributes(folder):
    data = read(folder / "*.tar")
    assert data.groups.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert data.groups.dtype == np.int32
    assert data.shards == [str(folder / f"{number:05d}.tar") for number in range(3)]
    assert (data.transform, data.tokenizer, data.modalities) == (to_tensor, tokenize, ("image", "text"))


def test_patterns(folder, monkeypatch):
    one = [name for name in IDS if name[4] != "2"]
    for shards in (
        f"{folder}/{{00000..00001}}.tar",
        folder / "0000{0..1}.tar",
        f"{folder}/0000{{0,1}}.tar",
        f"{folder}/0000[01].tar",
        [folder / "00000.tar", str(folder / "00001.tar")],
        (f"{folder}/*0.tar", f"{folder}/00{{0..0}}01.tar"),
    ):
        assert list(read(shards).ids) == one
    assert list(read(folder / "00002.tar").ids) == IDS[8:]
    assert list(read([folder / "00002.tar", folder / "00000.tar"]).ids) == IDS[8:] + IDS[:4]
    monkeypatch.chdir(folder)
    relative = read("0000{0..1}.tar")
    monkeypatch.chdir("/")
    assert "image" in relative[0]


def test_several_braces(folder):
    names = [f"{letter}-{k:02d}-x.tar" for letter in "ab" for k in (8, 9, 10)]
    for name in names:
        shutil.copy(folder / "00000.tar", folder / name)
    assert [os.path.basename(path) for path in read(folder / "{a,b}-{08..10}-*.tar").shards] == names


def test_braces_and_brackets_in_names(folder):
    for name in ("{0..1}.tar", "x[1]{y}.tar"):
        shutil.copy(folder / "00000.tar", folder / name)
        assert len(read(folder / name)) == 4


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (
            "0000{0..9}.tar",
            r"got none at .*/00003\.tar, .*/00004\.tar, .*/00007\.tar and 2 more\. Check the path; \{000\.\.331\} and \* stand",
        ),
        ("x*.tar", r"got none at .*/x\*\.tar\. Check"),
        ("", r"got none at .*/shards\. Check"),
    ],
)
def test_missing_shards(pattern, message, folder):
    with pytest.raises(FileNotFoundError, match=f"^TarPairs: expected tar files, {message}"):
        read(folder / pattern)


def test_impossible_lists_of_shards(folder):
    with pytest.raises(FileNotFoundError, match=r"^TarPairs: expected tar files, got none at \[\]\. Check"):
        read([])
    with pytest.raises(ValueError, match=r"^TarPairs: expected a range of shards like \{000000\.\.000331\}, got \{3\.\.1\} in .*\. Begin"):
        read(folder / "{3..1}.tar")
    write(folder / "more" / "00001.tar", shard(1))
    with pytest.raises(
        ValueError,
        match=r"^TarPairs: expected shards of different names, got .*/shards/00001\.tar and .*/more/00001\.tar\. Rename or remove",
    ):
        read([folder / "*.tar", folder / "more" / "*.tar"])


def test_grouping_of_members(tmp_path):
    members = {
        "./b.png": png(1),  # image and caption apart, and other members between
        "dir/": b"",
        "dir/b.PNG": png(2),
        "b.json": "{}",
        "a.seg.png": png(9),
        "a.txt": "a",
        "dir/b.TXT": "in dir",
        "dir.d/c.jpeg": png(3),
        "a.webp": png(4),
        "b.txt": "b",
        ".DS_Store": "x",
        "dir/._b.png": "x",
        "README": "x",
        "only.json": "{}",
        "dir.d/c.txt": "c",
    }
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, content in members.items():
            add(archive, {name: content}, tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE)
    data = read(tmp_path / "x.tar")
    assert list(data.ids) == ["x/b", "x/dir/b", "x/a", "x/dir.d/c"]
    assert [untokenize(sample["text"]) for sample in data] == ["b", "in dir", "a", "c"]
    assert [round(sample["image"][0].mean().item() * 255) for sample in data] == [1, 2, 4, 3]
    assert data.passed_over == {
        "with the extension .json": (2, "b.json"),
        "hidden files": (2, ".DS_Store"),
        "without an extension": (1, "README"),
        "further images or captions of samples": (1, "a.seg.png"),
    }


DOTTED = [f"{name}.{end}" for name in ("p1", "p2", "22.05_cat", "v1.5-dog", "p3") for end in ("jpg", "txt")]


def test_names_with_dots_are_said(tmp_path, folder):
    """Also from an index, of several shards, and where nothing else is there."""
    for number in range(2):
        write(tmp_path / f"{number}.tar", {name: png(1) if name.endswith("jpg") else "x" for name in DOTTED})
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"passed over 8 names with a dot before their .*, the first '22\.05_cat\.jpg' \(a name"):
            data = read(tmp_path / "[01].tar", index=tmp_path / "index.safetensors")
        assert data.passed_over == {module.DOTS: (8, "22.05_cat.jpg")}
        assert len(data) == 6
    write(tmp_path / "2.tar", {"1.input.jpg": png(1), "1.outputs.txt": "t"})
    with pytest.raises(ValueError, match=r"got none; 2 names with a dot before their extension, the first '1\.input\.jpg'\. Check"):
        read(tmp_path / "2.tar")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(read(tmp_path / "2.tar", image_extensions=("input.jpg",), caption_extension="outputs.txt")) == 1
        assert read(folder / "*.tar").passed_over == {"with the extension .json": (12, "000000000.json")}


def test_kinds_of_other_members_are_few(tmp_path):
    write(tmp_path / "x.tar", {"a.jpg": png(1), "a.txt": "x"} | {f"b.{k}": "x" for k in range(40)})
    passed = read(tmp_path / "x.tar").passed_over
    assert len(passed) == 17
    assert passed["others"] == (24, "b.16")


def test_an_archive_after_the_first_is_said(folder, tmp_path):
    (tmp_path / "both.tar").write_bytes((folder / "00000.tar").read_bytes() + (folder / "00001.tar").read_bytes())
    with pytest.warns(UserWarning, match=r"passed over 1 archives after the end of the first, the first .*both\.tar' \(tar stops"):
        assert len(read(tmp_path / "both.tar")) == 4


def test_an_index_of_before_what_is_passed_over_was_counted(folder, tmp_path, scanned):
    index = tmp_path / "index.safetensors"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "save", lambda tensors, metadata: save(*without(tensors, metadata)))
        read(folder / "*.tar", index=index)
    scanned.clear()
    assert read(folder / "*.tar", index=index).passed_over
    assert len(scanned) == 3


def without(tensors, metadata):
    kept = {key: value for key, value in tensors.items() if not key.endswith(".passed")}
    return kept, {**metadata, "checksum": module._checksum(kept, metadata)}


def test_extensions(folder, tmp_path):
    write(tmp_path / "x.tar", {"a.JPG": png(1), "a.cap": "a", "a.txt": "other"})
    assert untokenize(read(tmp_path / "x.tar", caption_extension="cap", image_extensions=["jpg"])[0]["text"]) == "a"
    data = read(folder / "*.tar", json_key="alt")
    assert untokenize(data[5]["text"]) == "alt 1"
    with pytest.raises(
        ValueError,
        match=r"^TarPairs: expected images and captions .*x\.tar, got none; 1 with the extension \.jpg, the first 'a\.JPG'",
    ):
        read(tmp_path / "x.tar", image_extensions=("gif",), caption_extension="xyz")
    for options in ({"image_extensions": "jpg"}, {"image_extensions": (".jpg",)}, {"image_extensions": ()}, {"caption_extension": ""}):
        with pytest.raises(
            ValueError, match=r"^TarPairs: expected extensions of images and captions without a dot in front, got .* Pass \('jpg'"
        ):
            read(folder / "*.tar", **options)


def test_names_of_all_kinds(tmp_path):
    """Longer than a header holds, not ASCII, not UTF-8."""
    names = ["x" * 90 + "/" + "y" * 160, "größe 犬 🐕", b"caf\xe9".decode("utf-8", "surrogateescape")]
    for number, style in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)):
        path = tmp_path / f"größe {number}.tar"
        write(path, {f"{name}.{end}": png(3) if end == "png" else "x" for name in names for end in ("png", "txt")}, format=style)
        data = read(path, index=tmp_path / "index.safetensors")
        assert list(data.ids) == [f"größe {number}/{name}" for name in names]
        assert all("image" in sample for sample in data)
        assert data.fingerprint
        assert list(read(path, index=tmp_path / "index.safetensors").ids) == list(data.ids)


def test_broken_samples(tmp_path):
    image = io.BytesIO()
    Image.effect_noise((64, 64), 90).convert("RGB").save(image, "JPEG")
    path = write(
        tmp_path / "x.tar",
        {"whole.jpg": png(1), "whole.txt": "w", "bare.jpg": png(1), "alone.txt": "x", "cut.jpg": image.getvalue()[:-600], "cut.txt": "x"}
        | {"empty.jpg": b"", "empty.txt": "x", "page.jpg": "<html>", "page.txt": "x", "latin.jpg": png(1), "latin.txt": b"gr\xf6\xdfe"}
        | {"blank.jpg": png(1), "blank.txt": " \n"},
    )
    reasons = {
        "bare": r"no \.txt member",
        "alone": r"no \.jpg or \.jpeg or \.png or \.webp member",
        "cut": r"image file is truncated.*",
        "empty": "empty file",
        "page": "not an image that PIL knows",
        "latin": "caption that is not UTF-8",
        "blank": "empty caption of 'x/blank'",
    }
    data = read(path)
    assert list(data.ids) == ["x/whole", *(f"x/{name}" for name in reasons)]
    strict = read(path, strict=True)
    assert "image" in strict[0]
    for k, (name, reason) in enumerate(reasons.items(), 1):
        assert data[k].keys() == {"id", "broken"}
        assert data[k]["id"] == f"x/{name}"
        with pytest.raises(ValueError, match=rf"^TarPairs: expected an? .*, got {path.with_suffix('')}.*/{name}: {reason}\. Repair it"):
            strict[k]
        assert data[k]["broken"].startswith(f"{path}/{name}: ")
    images, texts = read(path, modalities=("image",)), read(path, modalities=("text",))
    assert ["broken" in sample for sample in images] == [False, False, True, True, True, True, False, False]
    assert ["broken" in sample for sample in texts] == [False, True, False, False, False, False, True, True]
    assert data.lacking() == {"image": 1, "text": 1}
    assert images.lacking() == {"image": 1}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "member .json that is not JSON"),
        (b'{"alt": "\xff"}', "caption that is not UTF-8"),
        ('{"caption": "x"}', "no text at 'alt' in the .json member"),
        ('{"alt": null}', "no text at 'alt' in the .json member"),
        ('["alt"]', "no text at 'alt' in the .json member"),
        (None, "no .json member"),
    ],
)
def test_broken_json(content, reason, tmp_path):
    path = write(tmp_path / "x.tar", {"a.jpg": png(1), "a.txt": "x"} | ({} if content is None else {"a.json": content}))
    assert read(path, json_key="alt")[0] == {"id": "x/a", "broken": f"{path}/a: {reason}"}


def test_modalities(folder):
    texts = read(folder / "*.tar", modalities=("text",), transform=None)
    images = read(folder / "*.tar", modalities=("image",), tokenizer=forbidden)
    assert texts[1].keys() == {"id", "text"}
    assert images[1].keys() == {"id", "image"}
    assert texts.fingerprint | images.fingerprint == read(folder / "*.tar").fingerprint
    with pytest.raises(TypeError, match=r"^TarPairs: expected transform as a function of a PIL image, got None"):
        read(folder / "*.tar", transform=None)


@pytest.mark.parametrize("name", ["/etc/x.jpg", "../x.jpg", "a/../../x.jpg", "..", "./../x.txt", "a/.."])
def test_members_outside_are_refused(name, folder):
    with tarfile.open(folder / "00001.tar", "a") as archive:
        add(archive, {name: b""})
    with pytest.raises(
        ValueError, match=rf"^TarPairs: expected members with paths inside the archive in .*00001\.tar, got '{name}'\. Remove it\.$"
    ):
        read(folder / "*.tar")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(kind, folder):
    with tarfile.open(folder / "00001.tar", "a") as archive:
        add(archive, {"x.jpg": b""}, kind)
    with pytest.raises(
        ValueError, match=r"^TarPairs: expected files and folders in .*00001\.tar, got the member 'x\.jpg', a link, device, or"
    ):
        read(folder / "*.tar")


def test_sparse_members_are_refused(tmp_path):
    """Their content is not what lies behind the header."""
    header = tarfile.TarInfo("x.jpg")
    header.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "x.jpg", "GNU.sparse.realsize": "4096"}
    content = b"1\n4095\n1\n".ljust(512, b"\0") + b"x"
    header.size = len(content)
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(header, io.BytesIO(content))
    with pytest.raises(ValueError, match=r"got the member 'x\.jpg', a link, device, or sparse file\. Remove it\."):
        read(tmp_path / "x.tar")


@pytest.mark.parametrize(
    ("again", "what"),
    [("000010002.jpg", "image"), ("000010002.png", "image"), ("./000010002.txt", "caption"), ("000010002.TXT", "caption")],
)
def test_duplicates_are_refused(again, what, folder):
    with tarfile.open(folder / "00001.tar", "a") as archive:
        add(archive, {again: "x"})
    name = again.removeprefix("./")
    with pytest.raises(
        ValueError, match=rf"^TarPairs: expected one {what} for each name in .*00001\.tar, got a second one, '{name}'\. Remove"
    ):
        read(folder / "*.tar")


def test_every_truncation_is_an_error(tmp_path):
    """In a header, in a member's data, in its padding, between members, in the marks of the end."""
    whole = write(tmp_path / "x.tar", {"a.jpg": png(1), "a.txt": "x", "b.jpg": png(2), "b.txt": "y"}).read_bytes()
    with tarfile.open(tmp_path / "x.tar") as archive:
        last = archive.getmembers()[-1]
    end = last.offset_data + 512
    assert len(read(tmp_path / "x.tar")) == 2
    for size in [*range(0, end, 256), *range(end - 511, end), end, end + 1, end + 511]:
        (tmp_path / "cut.tar").write_bytes(whole[:size])
        with pytest.raises(
            ValueError, match=r"^TarPairs: expected a whole tar file, got .*cut\.tar, truncated or damaged \(.*\)\. Download"
        ):
            read(tmp_path / "cut.tar")
    (tmp_path / "cut.tar").write_bytes(whole[: end + 512])  # one block of zeros will do
    assert len(read(tmp_path / "cut.tar")) == 2


@pytest.mark.parametrize("position", [0, 512, 1024])
def test_damaged_headers_are_errors(position, tmp_path):
    content = bytearray(write(tmp_path / "x.tar", {"a.txt": "x", "b.txt": "y", "c.txt": "z"}).read_bytes())
    content[2 * position : 2 * position + 100] = b"x" * 100  # every member takes two blocks
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(ValueError, match=r"^TarPairs: expected a whole tar file, got .*x\.tar, truncated or damaged"):
        read(tmp_path / "x.tar")


def test_files_that_are_no_tar(tmp_path):
    (tmp_path / "x.tar").write_text("<html>404</html>" * 100)
    with pytest.raises(ValueError, match=r"^TarPairs: expected a whole tar file, got .*x\.tar, truncated or damaged"):
        read(tmp_path / "x.tar")


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz", "zst"])
def test_compressed_shards_are_refused(kind, folder):
    if kind == "zst":
        (folder / "x.tar").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(600))
    else:
        with tarfile.open(folder / "x.tar", f"w:{kind}") as archive:
            add(archive, shard(3))
    name = {"gz": "gzip", "bz2": "bzip2", "xz": "xz", "zst": "zstandard"}[kind]
    with pytest.raises(
        ValueError,
        match=rf"^TarPairs: expected an uncompressed tar file, got .*x\.tar, compressed by {name}: members of these .*\. Decompress",
    ):
        read(folder / "*.tar")


def test_empty_shard_among_others(folder):
    write(folder / "00000a.tar", {})
    data = read(folder / "*.tar")
    assert list(data.ids) == IDS
    assert data.groups.tolist() == [0] * 4 + [2] * 4 + [3] * 4
    with pytest.raises(ValueError, match=r"^TarPairs: expected images and captions in .*00000a\.tar, got none\. Check"):
        read(folder / "00000a.tar")


def test_fingerprints(folder, tmp_path):
    base = read(folder / "*.tar").fingerprint
    assert base["image"] != base["text"]
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    assert read(moved / "*.tar").fingerprint == base
    assert read([moved / "00001.tar", moved / "00000.tar", moved / "00002.tar"]).fingerprint["image"] != base["image"]
    other = read(moved / "*.tar", json_key="alt").fingerprint
    assert other["image"] == base["image"]
    assert other["text"] != base["text"]
    assert read(moved / "*.tar", json_key="key").fingerprint["text"] != other["text"]
    members = shard(1) | {"000010000.txt": "much longer " * 2000}
    write(moved / "00001.tar", members)
    changed = read(moved / "*.tar").fingerprint
    assert changed["image"] == base["image"]
    assert changed["text"] != base["text"]


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_worker_processes(method, folder, tmp_path):
    write(folder / "00001.tar", shard(1) | {"bare.jpg": png(1)})
    data = read(folder / "*.tar", index=tmp_path / "index.safetensors")
    expected = [data[k] for k in range(len(data))]  # the shards are open when workers are forked
    batches = list(DataLoader(data, batch_size=4, num_workers=2, collate_fn=collate, multiprocessing_context=method))
    ids = [name for batch in batches for name in batch["id"]]
    whole = [sample for sample in expected if "broken" not in sample]
    assert ids == [sample["id"] for sample in whole]
    assert torch.equal(torch.cat([batch["image"] for batch in batches]), torch.stack([sample["image"] for sample in whole]))
    assert torch.equal(torch.cat([batch["text"] for batch in batches]), torch.stack([sample["text"] for sample in whole]))
    assert [message for batch in batches for message in batch["broken"]] == [f"{folder}/00001.tar/bare: no .txt member"]
    assert all(equal(one, two) for one, two in zip(data, expected, strict=True))


def test_more_shards_than_are_kept_open(tmp_path, monkeypatch):
    for number in range(40):
        write(tmp_path / f"{number:05d}.tar", shard(number % 6, 2))
    data = read(tmp_path / "*.tar")
    before = len(os.listdir("/proc/self/fd"))
    for k in torch.randperm(80, generator=torch.Generator().manual_seed(0)).tolist() * 2:
        assert data[k]["id"] == data.ids[k]
        assert untokenize(data[k]["text"]) == f"größe {k // 2 % 6}.{k % 2}"
    assert len(os.listdir("/proc/self/fd")) <= before + 32


def test_pickle(folder):
    data = read(folder / "*.tar")
    copy = pickle.loads(pickle.dumps(data))
    assert list(copy.ids) == IDS
    assert equal(copy[7], data[7])
    assert copy.fingerprint == data.fingerprint


def test_shard_that_changes_or_goes(folder):
    data = read(folder / "*.tar")
    module._open.cache_clear()
    write(folder / "00001.tar", shard(1, 9))
    assert "image" in data[0]
    with pytest.raises(
        RuntimeError, match=r"^TarPairs: expected .*00001\.tar as it was when its headers were read, got a newer file\. Make"
    ):
        data[5]
    assert "image" in read(folder / "*.tar")[5]  # an open file of the old one is not taken for it
    (folder / "00002.tar").unlink()
    assert data[9] == {"id": IDS[9], "broken": f"{folder}/00002.tar/{IDS[9][6:]}: No such file or directory"}


# index ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def scanned(monkeypatch):
    """Names of the shards whose headers were read."""
    names = []

    def scan(path, extensions):
        names.append(os.path.basename(path))
        return original(path, extensions)

    original = module._scan
    monkeypatch.setattr(module, "_scan", scan)
    return names


def test_index_is_reused_for_what_did_not_change(folder, tmp_path, scanned):
    index = tmp_path / "index.safetensors"
    data = read(folder / "*.tar", index=index)
    assert len(scanned) == 3
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["index.safetensors"]
    scanned.clear()
    content = index.read_bytes()
    again = read(folder / "*.tar", index=str(index))
    assert not scanned
    assert list(again.ids) == IDS
    assert again.fingerprint == data.fingerprint
    assert all(equal(one, two) for one, two in zip(again, data, strict=True))
    assert list(read([folder / "00002.tar", folder / "00000.tar"], index=index).ids) == IDS[8:] + IDS[:4]
    moved = folder.rename(tmp_path / "moved")
    assert "image" in read(moved / "*.tar", index=index)[0]
    assert not scanned
    assert index.read_bytes() == content
    write(moved / "00001.tar", shard(1, 2))
    changed = read(moved / "*.tar", index=index)
    assert scanned == ["00001.tar"]
    assert list(changed.ids) == [*IDS[:6], *IDS[8:]]
    os.utime(moved / "00002.tar", (1, 1))
    read(moved / "*.tar", index=index)
    assert scanned == ["00001.tar", "00002.tar"]
    assert not [sample for sample in read(moved / "*.tar", index=index) if "broken" in sample]
    assert len(scanned) == 2
    write(moved / "00003.tar", shard(3))
    assert len(read(moved / "*.tar", index=index)) == 14
    assert scanned[2:] == ["00003.tar"]


def test_index_of_other_extensions_is_made_anew(folder, tmp_path, scanned):
    index = tmp_path / "index.safetensors"
    read(folder / "*.tar", index=index)
    assert untokenize(read(folder / "*.tar", index=index, json_key="alt")[0]["text"]) == "alt 0"
    assert len(scanned) == 6


def test_damaged_index_is_made_anew(folder, tmp_path, scanned):
    index = tmp_path / "index.safetensors"
    read(folder / "*.tar", index=index)
    whole = index.read_bytes()
    for size in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        scanned.clear()
        index.write_bytes(whole[:size])
        assert list(read(folder / "*.tar", index=index).ids) == IDS
        assert len(scanned) == 3
        assert len(read(folder / "*.tar", index=index)) == 12
        assert len(scanned) == 3  # it is whole again
    for position in (len(whole) - 1, len(whole) - 200, whole.index(b"00001"), whole.index(b"[[")):
        scanned.clear()
        index.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        assert list(read(folder / "*.tar", index=index).ids) == IDS
        assert len(scanned) == 3
        assert len(read(folder / "*.tar", index=index)) == 12
        assert len(scanned) == 3  # it is whole again


def test_files_that_are_no_index_are_not_replaced(folder, tmp_path):
    for index in (folder / "00000.tar", tmp_path / "index.json"):
        with pytest.raises(
            ValueError, match=r"^TarPairs: expected index as a \.safetensors file, got .*\. Pass 'shards\.safetensors', say"
        ):
            read(folder / "*.tar", index=index)
    save_file({"weight": np.zeros(3)}, tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(
        ValueError, match=r"^TarPairs: expected index as a file that TarPairs wrote, got .*model\.safetensors\. Pass another"
    ):
        read(folder / "*.tar", index=tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").read_bytes() == content


def test_index_that_cannot_be_written(folder, tmp_path):
    with pytest.raises(
        OSError, match=r"^TarPairs: expected to write the index .*nowhere/x\.safetensors, got: No such file or directory\. Pass"
    ):
        read(folder / "*.tar", index=tmp_path / "nowhere" / "x.safetensors")


def test_what_was_read_before_a_damaged_shard_is_kept(folder, tmp_path, scanned):
    good = (folder / "00002.tar").read_bytes()
    (folder / "00002.tar").write_bytes(good[:700])
    with pytest.raises(ValueError, match=r"got .*00002\.tar, truncated"):
        read(folder / "*.tar", index=tmp_path / "index.safetensors")
    scanned.clear()
    (folder / "00002.tar").write_bytes(good)
    assert list(read(folder / "*.tar", index=tmp_path / "index.safetensors").ids) == IDS
    assert scanned == ["00002.tar"]
