"""Text tables: whether the first line is a header, which columns are left out, separators, and what stays ambiguous."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from import_examples import everything, refused

from ntkdask.datasets import import_dataset
from ntkdask.errors import InputError


def imported(tmp_path: Path, text: str, **options):
    path = tmp_path / "a.csv"
    path.write_text(text, newline="", encoding="utf-8")
    return import_dataset(str(path), str(tmp_path / "d"), overwrite=True, **options)["all"]


@pytest.mark.parametrize(
    ("text", "rows", "labels"),
    [
        # R's write.table leaves the column of row names without a name
        ('"a","b","y"\n"1",5,6,"u"\n"2",7,8,"v"\n', [[5, 6], [7, 8]], ["u", "v"]),
        ('"a" "b" "y"\n"r one" 5 6 "u v"\n"r two" 7 8 "w"\n', [[5, 6], [7, 8]], ["u v", "w"]),
        # so does pandas, by an empty name, and again when it writes what it read
        (",a,b,y\n4,5,6,u\n0,7,8,v\n", [[5, 6], [7, 8]], ["u", "v"]),
        ("Unnamed: 0,a,b,y\n0,5,6,u\n1,7,8,v\n", [[5, 6], [7, 8]], ["u", "v"]),
        # an empty name over numbers that repeat is a feature
        (",b,y\n5,6,u\n5,8,v\n", [[5, 6], [5, 8]], ["u", "v"]),
        # a separator at the end of each line
        ("a,b,y\n5,6,u,\n7,8,v,\n", [[5, 6], [7, 8]], ["u", "v"]),
        ("5,6,u,\n7,8,v,\n", [[5, 6], [7, 8]], ["u", "v"]),
        # numbers for names
        ("0,1,2\n5,6,u\n7,8,v\n", [[5, 6], [7, 8]], ["u", "v"]),
        ("0,1,2,y\n5,6,7,1\n7,8,9,0\n", [[5, 6, 7], [7, 8, 9]], ["1", "0"]),
        ("0,1,2\n5.5,6,1\n7,8,0\n", [[5.5, 6], [7, 8]], ["1", "0"]),
        # a header of several lines
        ('"a\nof two",b,y\n5,6,u\n7,8,v\n', [[5, 6], [7, 8]], ["u", "v"]),
        ('\n"a\r\n,x";b;y\r\n5;6;u\r\n7;8;v\r\n', [[5, 6], [7, 8]], ["u", "v"]),
    ],
)
def test_headers_are_found(tmp_path: Path, text: str, rows, labels) -> None:
    dataset = imported(tmp_path, text)
    x, targets = everything(dataset)
    np.testing.assert_array_equal(x, rows)
    assert [dataset.class_names[t] for t in targets] == labels
    assert dataset.provenance["header"] == (not text.startswith("5"))


@pytest.mark.parametrize(
    ("text", "n"),
    [("5,6,u\n7,8,v\n5,6,u\n", 3), ("5,6,A\n7,8,v\n1,2,3\n", 3), ("u,5,6\nv,7,8\n", 2), ("1,2,3\n1,2,4\n1,2,x\n", 3)],
)
def test_first_rows_are_kept(tmp_path: Path, text: str, n: int) -> None:
    dataset = imported(tmp_path, text, target=0 if text[0] == "u" else None)
    assert (dataset.n, dataset.provenance["header"]) == (n, False)


def test_a_missing_value_in_the_first_row_is_no_name(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("?,y,v\n2,6,v\n")
    refused(path, tmp_path / "d", "--header yes or --header no")
    for text in ("1,?,3,yes\n2,5,4,no\n", "?,1,u\n2,3,v\n", "1,NA,0.5\n2,3,0.5\n"):
        path.write_text(text)
        refused(path, tmp_path / "d", "missing in line 1 ")


@pytest.mark.parametrize(
    ("text", "with_header", "without"),
    [
        ("5,6,A\n7,8,1\n9,1,2\n", 2, ["1", "2", "A"]),
        ("4,6,2\n7,8,u\n9,1,v\n", 2, ["2", "u", "v"]),
        ("0,1,2\n3,4,5\n6,7,8\n", 2, ["2", "5", "8"]),
        ("2019,2020,y\n7,8,1\n9,1,2\n", 2, ["1", "2", "y"]),
        # years over numbers, and a word of its own over words
        ("1990,1991,1992,y\n7,8,1,u\n9,1,2,v\n", 2, ["u", "v", "y"]),
        ("10,30,y\n7.5,8,u\n9,1,v\n", 2, ["u", "v", "y"]),
        ("1990,1991,1992\n7.5,8,1\n9,1,2\n", 2, ["1", "2", "1992"]),
    ],
)
def test_ambiguous_first_lines_ask(tmp_path: Path, text: str, with_header: int, without: list[str]) -> None:
    path = tmp_path / "a.csv"
    path.write_text(text)
    refused(path, tmp_path / "d", "line 1, .* may be a header or the first row.*--header yes or --header no")
    assert imported(tmp_path, text, header=True).n == with_header
    assert imported(tmp_path, text, header="no").class_names == tuple(without)


def test_the_sample_is_more_than_two_lines(tmp_path: Path) -> None:
    # the label of row 1 comes again in row 150 alone, all others are numbers
    labels = ["A", *["1", "2"] * 74, "A", "B"]
    dataset = imported(tmp_path, "".join(f"{i}.5,6,{label}\n" for i, label in enumerate(labels)))
    assert (dataset.n, dataset.class_names) == (len(labels), ("1", "2", "A", "B"))


def test_names_that_are_numbers_name_the_target(tmp_path: Path) -> None:
    text = "2019,2020,2021\n0.5,1.5,2.5\n3.5,4.5,5.5\n"
    dataset = imported(tmp_path, text, header="yes", target="2019")
    np.testing.assert_array_equal(everything(dataset)[1], [0.5, 3.5])
    assert dataset.provenance["target"] == "2019"
    assert dataset.provenance["target_column"] == "0 of 3, counted from 0"
    (tmp_path / "two.csv").write_text("a,a,y\n1,2,0.5\n")
    refused(tmp_path / "two.csv", tmp_path / "e", "2 columns 'a'.*by its number", target="a")


def test_rows_of_other_lengths_are_refused(tmp_path: Path) -> None:
    url = tmp_path / "d"
    for i, (text, words) in enumerate(
        (
            ("a,b,y\n1,2,3,4,5\n1,2,3,4,5\n", "3 names in its header and 5 fields"),
            ("a,b,c,y\n1,2,3\n4,5,6\n", "4 names in its header and 3 fields"),
            ("1,2,3\n4,5,6,7\n4,5,6,7\n", "Every line needs 3 fields"),
            ("a,b,y\n1,2,3\n4,5,6,7\n", "Expected 3 fields in line 3"),
            ("5,6,u,\n" * 300 + "7,8,v,9\n", "line 301 has a value in the last column"),
        )
    ):
        path = tmp_path / f"{i}.csv"
        path.write_text(text)
        with warnings.catch_warnings():
            # outside the tests warnings are no errors
            warnings.simplefilter("ignore")
            refused(path, url, words)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refused(tmp_path / "0.csv", url, "Every line needs|fields", header="no")


def test_header_is_for_tables_alone(tmp_path: Path) -> None:
    refused("sklearn:iris", tmp_path / "d", "header='yes'.*Leave it out", header="yes")
    with pytest.raises(InputError, match="give True or 'yes'"):
        import_dataset("sklearn:iris", str(tmp_path / "d"), header="maybe")


def test_commas_in_numbers_do_not_make_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("1,5;2,5;3,5\n4,5;5,5;6,5\n")
    refused(path, tmp_path / "d", "'3,5' in line 1, which is not read as a number")
    path.write_text("a;b;y\n1,5;2,5;3\n4,5;5,5;6\n")
    refused(path, tmp_path / "d", "holds '1,5' in line 2; features are numbers. Write numbers with a decimal point")
