"""Rows of CSV files: every separator, tricky texts, and damage named by its line."""

import csv
import random

import pytest

from geomreg.integrations.recipes.data.table import SEPARATORS, read_columns, read_lines, read_rows

CAPTIONS = [
    "a dog, a cat; and a | bar",
    "tab\tinside",
    "two\nlines, and\r\nmore",
    'he said "no"',
    '"quoted from the start"',
    "Größe 犬 🐕 \u2028 \x0b",
    "",
    " spaces ",
    '5" tall',
]


def rows(path, **more):
    return list(read_rows("reader", str(path), **more))


def write(path, table, separator, **more):
    with open(path, "w", newline="", encoding=more.pop("encoding", "utf-8")) as file:
        csv.writer(file, delimiter=separator, **more).writerows(table)
    return path


@pytest.mark.parametrize("separator", SEPARATORS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("more", [{}, {"quoting": csv.QUOTE_ALL}, {"lineterminator": "\n"}, {"lineterminator": "\r"}])
def test_separator_is_found_whatever_is_in_the_texts(separator, encoding, more, tmp_path):
    table = [["filepath", "title"], *([f"{i}.jpg", caption] for i, caption in enumerate(CAPTIONS))]
    path = write(tmp_path / "x", table, separator, encoding=encoding, **more)
    assert [fields for _, fields in rows(path)] == table
    assert [fields for _, fields in rows(path, separator=separator)] == table


@pytest.mark.parametrize("separator", SEPARATORS)
def test_separator_of_a_file_longer_than_the_sample(separator, tmp_path):
    draw = random.Random(0)
    table = [["filepath", "title"], *([f"{i}.jpg", ", ;|\n".join(draw.choices(CAPTIONS, k=5))] for i in range(3000))]
    assert [fields for _, fields in rows(write(tmp_path / "x", table, separator))] == table


def test_known_names_decide_between_separators(tmp_path):
    path = tmp_path / "x"
    path.write_text("title (en, de)\timage\na, b\tc\nd, e\tf\n")
    assert rows(path, known={"image"})[1] == (2, ["a, b", "c"])
    path.write_text("title,n01|n02\nx,y|z")  # both fit; the known name says which
    assert rows(path, known={"title"})[0] == (1, ["title", "n01|n02"])


@pytest.mark.parametrize("text", ["caption\na, b\nc; d, e\n", "caption\n"])
def test_one_column(text, tmp_path):
    path = tmp_path / "x"
    path.write_text(text)
    assert [fields for _, fields in rows(path)] == [[line] for line in text.splitlines()]


def test_lines_are_those_of_the_file(tmp_path):
    path = tmp_path / "x"
    path.write_text('a,b\n\n1,"x\ny\nz"\n\r\n2,w\n\n')
    assert rows(path) == [(1, ["a", "b"]), (3, ["1", "x\ny\nz"]), (7, ["2", "w"])]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"expected rows in .*x\.csv, got an empty file\. Write a header"),
        (b"\n\r\n\n", r"expected rows in .*, got an empty file"),
        (b"\xef\xbb\xbf", r"expected rows in .*, got an empty file"),
        (b'a,b\n1,"2\n3"\n4\n5,6', r"expected 2 fields a row as in the first, separated by ',', got 1 in line 4 of .*x\.csv\. Put quotes"),
        (b"a\tb\n1\t2\n1\t2\t3\n", r"separated by '\\t', got 3 in line 3 of"),
        ("a,b\n1,é\n".encode("latin-1"), r"expected UTF-8, got other bytes in line 2 of .*x\.csv\. Save it as UTF-8\.$"),
        (
            b"a,b\n1,2\n3,4\x005\n",
            r"expected text, got a NUL byte in line 3 of .*x\.csv\. Save it as UTF-8 if it is UTF-16",
        ),
        (b"a,b\n" + b"1,2\n" * 50_000 + bytes(512), r"expected text, got a NUL byte in line 50002 of"),
        ("a,b\n1,2\n".encode("utf-16-le"), r"expected text, got a NUL byte in line 1 of"),
        (b"a,b\n" + b"1,2\n" * 50_000 + b"1,\xff\n", r"expected UTF-8, got other bytes in line 50002 of"),
        ("a,b\n1,2\n".encode("utf-16"), r"expected UTF-8, got other bytes in line 1 of"),
        (b'a,b\n1,"2\n3,4\n', r"csv module reads, got unexpected end of data \(line 2 of .*x\.csv\)\. Put quotes"),
        (b'a,b\n0,0\n1,"two" and\n', r"csv module reads, got ',' expected after '\"' \(line 3 of"),
        (b'a\tb\n1\t"big\n2\tdog\n3\t"small\n', r"csv module reads, got .* \(line 2 of"),  # pandas makes one row of these three
        (b'a,b\n1,"' + b"2,3\n" * 50_000, r"csv module reads, got field larger than field limit \(131072\) \(line 2 of"),
    ],
)
def test_damaged_files(content, message, tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^reader: .*{message}"):
        rows(path)


@pytest.mark.parametrize("separator", ["", ", ", "\\t", '"', "\n", 3])
def test_impossible_separators(separator, tmp_path):
    path = write(tmp_path / "x", [["a", "b"]], ",")
    with pytest.raises(ValueError, match=r"^reader: expected separator as one character, got .*\. Pass ','"):
        rows(path, separator=separator)


def test_no_file(tmp_path):
    for path in (tmp_path, tmp_path / "x"):
        with pytest.raises(FileNotFoundError, match=r"^reader: expected a CSV or TSV file, got none at .*\. Check the path\.$"):
            rows(path)


def test_columns(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text('a, b,c\n1,"2\n2",3\n4,5|,6\n')
    assert list(read_columns("reader", str(path), ("c", "b"))) == [(2, ["3", "2\n2"]), (4, ["6", "5|"])]
    with pytest.raises(
        ValueError, match=r"^reader: expected the columns 'c', 'd' in .*x\.csv, got 'a', 'b', 'c'\. Pass the original file\.$"
    ):
        next(read_columns("reader", str(path), ("c", "d")))


def test_lines(tmp_path):
    path = tmp_path / "x"
    path.write_bytes("\ufeff a\tb \r\n\n \n\u2028größe\nlast".encode())
    assert list(read_lines("reader", str(path))) == [(1, " a\tb "), (4, "\u2028größe"), (5, "last")]
    path.write_bytes(b"a\n\xff\n")
    with pytest.raises(ValueError, match=r"^reader: expected UTF-8, got other bytes in line 2 of .*x\. Save it as UTF-8\.$"):
        list(read_lines("reader", str(path)))
    with pytest.raises(FileNotFoundError, match=r"^reader: expected a text file, got none at .*\. Check the path\.$"):
        list(read_lines("reader", str(tmp_path)))


def test_lines_with_nul_are_refused(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"one\ntwo\x00\n")
    with pytest.raises(ValueError, match=r"^Reader: expected text, got a NUL byte in line 2 of .*x\.txt"):
        list(read_lines("Reader", str(tmp_path / "x.txt")))
