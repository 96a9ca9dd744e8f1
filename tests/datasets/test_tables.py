"""Tables (CSV): columns, classes, dialects, what is refused, and the memory that reading takes."""

from __future__ import annotations

import gzip
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from import_examples import everything, generator, refused

from ntkdask.datasets import import_dataset
from ntkdask.errors import InputError


def test_csv(tmp_path: Path) -> None:
    x, targets = generator(7).standard_normal((50, 3)), generator(8).standard_normal(50)
    lines = [",".join(map(repr, [*row.tolist(), t])) for row, t in zip(x, targets.tolist(), strict=True)]
    plain = tmp_path / "a.csv"
    plain.write_text("\n".join(lines) + "\n\n")
    dataset = import_dataset(str(plain), str(tmp_path / "a"))["all"]
    assert (dataset.kind, dataset.dtype, dataset.row_shape) == ("regression", "float64", (3,))
    np.testing.assert_allclose(everything(dataset)[0], x, rtol=1e-15)
    np.testing.assert_allclose(everything(dataset)[1], targets, rtol=1e-15)

    packed = tmp_path / "b.csv.gz"
    packed.write_bytes(gzip.compress(("a,b,c,y\n" + "\n".join(lines)).encode()))
    assert import_dataset(str(packed), str(tmp_path / "b"))["all"].digest == dataset.digest
    by_name = import_dataset(str(packed), str(tmp_path / "c"), target="b")["all"]
    by_number = import_dataset(str(plain), str(tmp_path / "n"), target=1)["all"]
    from_the_end = import_dataset(str(plain), str(tmp_path / "e"), target="-3")["all"]
    assert by_name.digest == by_number.digest == from_the_end.digest
    np.testing.assert_allclose(by_name.targets(0, 50), x[:, 1], rtol=1e-15)
    np.testing.assert_allclose(by_name.rows(0, 50)[:, 2], targets, rtol=1e-15)
    unlabelled = import_dataset(str(plain), str(tmp_path / "u"), kind="unlabelled")["all"]
    assert (unlabelled.row_shape, unlabelled.target_shape) == ((4,), None)


@pytest.mark.parametrize(
    ("text", "names", "labels"),
    [
        ("5.1,3.5,setosa\n4.9,3.0,virginica\n4.7,3.2,setosa\n", ("setosa", "virginica"), [0, 1, 0]),
        ("a,b,species\n5.1,3.5,b c\n4.9,3.0,a\n", ("a", "b c"), [1, 0]),
        ("a;b;y\n1;2;10\n3;4;9\n", ("9", "10"), [1, 0]),
        ("1\t2\tNone\n3\t4\tNA\n", ("NA", "None"), [1, 0]),
        (" 1.0  2.0   1\n -1.5 4e3  0\n", ("0", "1"), [1, 0]),
        ('a,b,y\r\n1,2,"x, y"\r\n3,4,z\r\n', ("x, y", "z"), [0, 1]),
        ("\ufeffa,b,y\n1,2,0\n3,4,1\n", ("0", "1"), [0, 1]),
        ("1,2,3\n1,2,4\n1,2,x\n", ("3", "4", "x"), [0, 1, 2]),
    ],
)
def test_csv_classes_and_dialects(tmp_path: Path, text: str, names, labels) -> None:
    path = tmp_path / "a.data"
    path.write_text(text, newline="")
    dataset = import_dataset(str(path), str(tmp_path / "d"), format="csv")["all"]
    assert dataset.class_names == names
    assert dataset.targets(0, dataset.n).tolist() == labels


def test_csv_integer_targets_may_be_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("1,2,7\n3,4,9\n")
    assert import_dataset(str(path), str(tmp_path / "c"))["all"].kind == "classification"
    dataset = import_dataset(str(path), str(tmp_path / "r"), kind="regression")["all"]
    assert dataset.targets(0, 2).tolist() == [7.0, 9.0]
    path.write_text("".join(f"1,2,{i}\n" for i in range(1500)))
    with pytest.raises(InputError, match="kind='regression'"):
        import_dataset(str(path), str(tmp_path / "many"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,colour,y\n1,red,0\n2,blue,1\n", "column 'colour' holds 'red' in line 2"),
        ("1,2,0.5\n" * 9 + "1,x,0.5\n", "column '1' holds 'x' in line 10"),
        ("a,b,y\n1,,0\n2,3,1\n\nnan,1,1\n", "missing in lines 2, 5"),
        ("1,2,0.5\n3,4,\n", "missing in line 2"),
        ("1,2,0.5\n3,4,?\n", r"holds numbers, but '\?' in line 2"),
        ("1,2,3\n4,5,6,7\n", "Expected 3 fields in line 2"),
        ("1,2,3\n4,5\n", "missing in line 2"),
        ("", "empty"),
        ("a,b\n", "no rows"),
        ("1\n2\n", "one column"),
    ],
)
def test_tables_that_are_no_numbers_are_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(text)
    refused(path, tmp_path / "d", words)


def test_csv_targets_that_are_not_there(tmp_path: Path) -> None:
    path, url = tmp_path / "a.csv", tmp_path / "d"
    path.write_text("width,height,y\n1,2,0.5\n")
    refused(path, url, "did you mean 'height'", target="heigth")
    refused(path, url, "3 columns, no column 3", target=3)
    path.write_text("1,2,0.5\n")
    refused(path, url, "no header", target="y")
    path.write_bytes("1,2,café\n".encode("latin1"))
    refused(path, url, "UTF-8")
    path.write_text("1,2,text\n")
    refused(path, url, "holds text", kind="regression")
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(b"1.5,2.25,3.125\n" * 9999)[:-40])
    refused(tmp_path / "b.csv.gz", url, "truncated or damaged")
    path.write_text("1,2,0.5\n1,inf,0.5\n")
    with pytest.raises(InputError, match="row 1 of x holds NaN"):
        import_dataset(str(path), str(url))


def test_csv_memory_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    line = ",".join(f"{v:.2f}" for v in generator(9).standard_normal(100)) + "\n"
    path.write_text(line * 30_000)  # 24 MB as float64
    tracemalloc.start()
    dataset = import_dataset(str(path), str(tmp_path / "d"))["all"]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert dataset.n * 99 * 8 > 23e6
    # one chunk of rows from pandas with its copies, one in the writer with its copies
    assert peak < 18 * 2**20


@pytest.mark.parametrize(
    "number", ["1,5", '"1,234"', '"1,234,567.5"', "1.234,5", "1'234", "1 234", "5%", "$5", "\u22125"]
)
def test_targets_that_are_nearly_numbers_are_no_classes(tmp_path: Path, number: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"a;b;y\n1;2;{number}\n3;4;{number}\n5;6;7\n", encoding="utf-8")
    refused(
        path, tmp_path / "d", "column 'y', holds .* in line 2, which is not read as a number.*--kind classification"
    )
    dataset = import_dataset(str(path), str(tmp_path / "c"), kind="classification")["all"]
    assert (dataset.n, sorted(dataset.class_names)) == (3, sorted(("7", number.strip('"'))))
    path.write_text(f"a;b;y\n1;{number};u\n3;4;v\n", encoding="utf-8")
    refused(path, tmp_path / "e", "column 'b' holds .* in line 2; .*Write numbers with a decimal point")


def test_labels_of_64_bits_stay_apart(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    labels = [2**53, 2**53 + 1, 2**63 - 1, 2**63 - 2, 2**64 - 1]
    path.write_text("a,y\n" + "".join(f"1,{label}\n" for label in labels))
    dataset = import_dataset(str(path), str(tmp_path / "d"))["all"]
    assert [int(dataset.class_names[t]) for t in dataset.targets(0, 5)] == labels
    # a float among them makes pandas read all as float64
    path.write_text(f"a,y\n1,{2**53 + 1}\n1,{2**53}\n1,1.0\n")
    refused(path, tmp_path / "e", f"'{2**53 + 1}' in line 2, an integer that would lose digits.*--kind classification")
    assert import_dataset(str(path), str(tmp_path / "c"), kind="classification")["all"].class_names == (
        "1.0",
        str(2**53),
        str(2**53 + 1),
    )


def test_integers_beyond_64_bits(tmp_path: Path) -> None:
    path, large = tmp_path / "a.csv", 10**30 + 1
    path.write_text(f"a,y\n{large},u\n2,v\n")
    np.testing.assert_array_equal(everything(import_dataset(str(path), str(tmp_path / "x"))["all"])[0], [[1e30], [2]])
    path.write_text(f"a,y\n1,{large}\n2,{large + 1}\n3,5\n")
    refused(path, tmp_path / "d", f"holds '{large}' in line 2, an integer that would lose digits")
    dataset = import_dataset(str(path), str(tmp_path / "c"), kind="classification")["all"]
    assert dataset.class_names == (str(large), str(large + 1), "5")
    numbers = import_dataset(str(path), str(tmp_path / "r"), kind="regression")["all"]
    np.testing.assert_array_equal(numbers.targets(0, 3), [1e30, 1e30, 5])
    # whole numbers that are written as floats are no labels
    path.write_text("a,y\n1,1e20\n2,2.0e20\n")
    assert import_dataset(str(path), str(tmp_path / "f"))["all"].targets(0, 2).tolist() == [1e20, 2e20]


def test_columns_of_text_and_numbers_give_no_raw_warning(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("a,b,y\n" + "1,2,0\n" * 90_000 + "1,x,0\n")
    refused(path, tmp_path / "d", "column 'b' holds 'x' in line 90002")


def test_what_became_the_target_is_in_the_provenance(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("a,y,b\n1,5,2\n3,6,4\n")
    for target, name, place in ((None, "b", 2), ("y", "y", 1), (0, "a", 0), ("-2", "y", 1)):
        told = import_dataset(str(path), str(tmp_path / "d"), target=target, overwrite=True)["all"].provenance
        assert (told["target"], told["target_column"]) == (name, f"{place} of 3, counted from 0")
