"""Numbers of a user's files: columns by name, separators, first lines, and what float32 cannot hold."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from efficientai_toolkit.errors import DataError
from efficientai_toolkit.tasks.numbers import column_names, read_numbers


@pytest.fixture
def written(tmp_path):
    def write(text: str):
        (tmp_path / "x.csv").write_text(text)
        return tmp_path / "x.csv"

    return write


def test_columns_are_taken_by_name(written):
    file = written("b,Label,a\n2,yes,1\n4,no,3\n")
    assert column_names(file) == ["b", "a"]
    x, labels = read_numbers(file, columns=["a", "b"])
    assert x.tolist() == [[1, 2], [3, 4]]
    assert labels == ["yes", "no"]
    assert read_numbers(file)[0].tolist() == [[2, 1], [4, 3]]
    twice = written("a,a,label\n1,2,x\n")  # two columns of one name are told apart by their places alone
    assert read_numbers(twice, columns=["a", "a"])[0].tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,c\n1,2\n", r"no column 'b'; unknown column 'c'"),
        ("a\n1\n", r"x\.csv, line 1, .*: no column 'b'"),
        ("a,b,c\n1,2,3\n", r"unknown column 'c'"),
        ("a,b,b\n1,2,3\n", r"2 columns 'b'"),
        ("1,b\n1,2\n", r"no column 'a'; unknown column '1'"),
    ],
)
def test_columns_that_are_missing_or_unknown_are_named(written, text, said):
    with pytest.raises(DataError, match=said):
        read_numbers(written(text), labelled=False, columns=["a", "b"])


def test_a_first_line_of_numbers_is_a_row_unless_these_are_the_names(written):
    file = written("0,1\n2,3\n")
    assert read_numbers(file, labelled=False, columns=["a", "b"])[0].tolist() == [[0, 1], [2, 3]]
    assert read_numbers(file, labelled=False, columns=["0", "1"])[0].tolist() == [[2, 3]]
    assert read_numbers(written("1,0\n2,3\n"), labelled=False, columns=["0", "1"])[0].tolist() == [[3, 2]]
    with pytest.raises(DataError, match="2 columns where the header has 3"):
        read_numbers(written("0,1,5\n2,3\n"), labelled=False)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a;b;label\n0,5;1,5;x\n", r"line 1: the separator is ';'; expected ',' between columns, and '\.' in numbers"),
        ("sep=;\na;b;label\n", "the separator is ';'"),
        ("a\tb\tlabel\n1\t2\tx\n", r"the separator is '\\t'"),
        ("a,b,target\n1,2,left\n", "no column label: its columns are a, b, target; name that of the labels label"),
        ("1,2\n3,4\n", "no column label: its columns are 1, 2"),
        ("a,label,Label\n1,x,y\n", "line 1: 2 columns label; expected one"),
    ],
)
def test_other_layouts_are_named(written, text, said):
    with pytest.raises(DataError, match=said):
        read_numbers(written(text))


def test_what_float32_cannot_hold_is_said_without_a_warning(written, tmp_path):
    np.savez(tmp_path / "x.npz", x=np.array([[1.0], [1e39]]), y=["a", "b"])
    np.savez(tmp_path / "complex.npz", x=np.array([[1j]]), y=["a"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for file, row in ((written("a,label\n1e39,x\n2,y\n"), 1), (tmp_path / "x.npz", 2)):
            with pytest.raises(DataError, match=rf"example {row} holds a number that is not finite, or beyond ±3.4e38"):
                read_numbers(file)
        with pytest.raises(DataError, match="x holds complex128; expected numbers"):
            read_numbers(tmp_path / "complex.npz")


def test_whole_numbers_of_an_npz_stay_whole(tmp_path):
    for kind, kept in ((np.uint8, np.uint8), (np.float64, np.float32), (bool, np.float32)):
        np.savez(tmp_path / "x.npz", x=np.ones((2, 3), kind), y=[1, 2])
        x, _ = read_numbers(tmp_path / "x.npz")
        assert x.dtype == kept
    assert column_names(tmp_path / "x.npz") is None


@pytest.mark.parametrize(("header", "rows"), [("0,1", 2), ("1,2", 2), ("0.5,1", 3), ("1,0", 3)])
def test_columns_that_are_numbered_are_a_header(tmp_path, header, rows):
    """As `DataFrame(x).to_csv(index=False)` writes it."""
    path = tmp_path / "points.csv"
    path.write_text(f"{header}\n0.1,0.2\n1,2\n")
    assert read_numbers(path, labelled=False)[0].shape == (rows, 2)


@pytest.mark.parametrize("text", ["1\n2\n3\n", "0\n", "1\n"])
def test_the_first_of_one_column_of_numbers_is_a_row(written, text):
    x, labels = read_numbers(written(text), labelled=False)
    assert (x[:, 0].tolist(), labels) == ([float(line) for line in text.split()], None)
    assert read_numbers(written("1\n2\n"), labelled=False, columns=["1"])[0].tolist() == [[2]]
    assert read_numbers(written("0,label\n5,a\n"))[0].tolist() == [[5]]


def test_a_column_of_labels_that_is_blank_throughout_has_none(written):
    for file in (written("x,Target\n1,\n2, \n"), written("label,x\n,1\n,2\n")):
        x, labels = read_numbers(file, labelled=False, regression=True)
        assert (x.tolist(), labels) == ([[1], [2]], None)
        with pytest.raises(DataError, match=r"line 2: the (Target|label) is missing.*line 3: the"):
            read_numbers(file, regression=True)
    with pytest.raises(DataError, match="line 3: the Target is missing"):
        read_numbers(written("x,Target\n1,2\n2,\n"), labelled=False, regression=True)


def test_the_targets_of_a_regression_have_other_names_too(written):
    for header, label in (("x,y", "2"), ("x,Target", "2"), ("target,label", "2"), ("y,target", "2")):
        file = written(f"{header}\n1,2\n")
        x, labels = read_numbers(file, regression=True)
        assert (x.tolist(), labels) == ([[1]], [label])
        assert column_names(file, regression=True) == header.split(",")[:1]
    assert read_numbers(written("x,y\n1,2\n"), labelled=False)[0].shape == (1, 2)  # of a classifier it is an input
    x, labels = read_numbers(written("x,y\n1,2\n"), labelled=False, columns=["x", "y"], regression=True)
    assert (x.shape, labels) == ((1, 2), None)  # and of a regression that was adapted to it
    with pytest.raises(DataError, match=r"its columns are a, b; name that of the targets label$"):
        read_numbers(written("a,b\n1,2\n"), regression=True)
    with pytest.raises(DataError, match="2 columns target; expected one"):
        read_numbers(written("target,target\n1,2\n"), regression=True)
