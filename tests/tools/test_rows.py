"""Runs as rows: which are one, and what it is called."""

import pytest

from kdmini.contracts import UserError
from kdmini.tools.compare import main
from kdmini.tools.rows import group, names_of, read_run, settings_of
from tests.tools.run_folders import write


def rows_of(*folders):
    return group([read_run(folder) for folder in folders])


@pytest.mark.parametrize(
    "others, names",
    [
        ([{}], ["first"]),
        ([{"train": {"epochs": 3, "lr0": 0.01, "amp": True}}], ["amp unset", "amp=true"]),
        ([{"teacher": {"build": "a:Net", "weights": "x.pt"}}], ["teacher unset", "teacher=Net"]),
        (
            [
                {"teacher": {"build": "a:Net", "weights": "x.pt"}},
                {"teacher": {"build": "a:Net", "weights": "y.pt"}},
            ],
            ["teacher unset", "teacher=Net, weights=x.pt", "teacher=Net, weights=y.pt"],
        ),
        (
            [{"distill": {"taps": ["model.6"], "att": {"weight": 1}, "l2": {}}}],
            ["distill unset", "distill=att+l2"],
        ),
        (
            [
                {"distill": {"a": {"weight": 1}, "b": {"weight": 2}}},
                {"distill": {"a": {"weight": 3}, "b": {"weight": 4}}},
            ],
            [
                "distill unset",
                "distill=a+b, a.weight=1, b.weight=2",
                "distill=a+b, a.weight=3, b.weight=4",
            ],
        ),
        (
            [{"data": {"train": {"splits": ["x|y", "z"]}}}, {"data": {"train": {"splits": None}}}],
            ["data unset", "data=train, splits=['x|y', 'z']", "data=train, splits unset"],
        ),
    ],
)
def test_a_row_is_named_by_the_keys_in_which_it_differs(tmp_path, others, names):
    folders = [write(tmp_path / "first", [0.1])]
    for i, settings in enumerate(others, 1):
        folders.append(write(tmp_path / f"run{i}", [0.1], i, settings))
    assert settings_of(rows_of(*folders)) == names


def test_where_the_records_go_makes_no_row(tmp_path):
    one = write(tmp_path / "one", [0.1])
    other = write(tmp_path / "other", [0.2], 1, settings={"log": {"build": "a:Logger"}})
    assert len(rows_of(one, other)) == 1


def test_a_name_that_is_too_long_is_the_folder(tmp_path):
    low = {f"key{i}": i for i in range(12)}
    high = {f"key{i}": i + 1 for i in range(12)}
    one = write(tmp_path / "one", [0.1], settings={"data": {**low, "a": 1}})
    other = write(tmp_path / "other", [0.2], settings={"data": high})
    rows = rows_of(one, other)
    assert names_of(rows) == [one, other]
    assert settings_of(rows)[0] == ", ".join([*(f"key{i}={i}" for i in range(12)), "a=1"])


def test_a_section_that_is_not_there_makes_a_short_name(tmp_path):
    long = {"data": {f"key{i}": i for i in range(12)}}
    one = write(tmp_path / "one", [0.1])
    other = write(tmp_path / "other", [0.2], settings=long)
    assert names_of(rows_of(one, other)) == ["data unset", "data=given"]


@pytest.mark.parametrize("pair", [("one", "other"), ("one", "one")])
def test_the_same_config_and_seed_twice_is_no_spread(tmp_path, pair):
    one = write(tmp_path / "one", [0.1])
    write(tmp_path / "other", [0.2])
    folders = [str(tmp_path / name) for name in pair]
    message = f"{folders[1]}: same config and seed as {one}; name one"
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        main([*folders, "--out", str(tmp_path / "out")])
    with pytest.raises(UserError, match=message):
        rows_of(*folders)
