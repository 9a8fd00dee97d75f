"""What a config leaves out, and what somebody types in the place of a setting."""

import pytest
import yaml

import eval as eval_script
import train as train_script
from kdmini.defaults import defaults, filled
from tests.commands import run
from tests.conftest import CONFIG, TINY

SETTINGS = yaml.safe_load(CONFIG.format(run="run", shapes="shapes", tiny=TINY))


def test_every_section_gets_its_defaults_and_keeps_its_own() -> None:
    full = filled(SETTINGS, defaults(SETTINGS))
    assert full["train"]["lr0"] == 0.01
    assert full["train"]["nbs"] == 16
    assert full["data"]["augment"]["close_mosaic"] == 10
    assert full["data"]["on_bad"] == "stop"
    assert full["teacher"]["box"] == 7.5
    assert full["distill"]["attention"]["reduction"] == "notes"
    assert full["distill"]["attention"]["schedule"] == [[0, 2.0, 2, 0.0], [3, 1.0, 4, 1.0]]
    assert filled(full, defaults(full)) == full


def test_a_section_that_is_not_there_is_not_made() -> None:
    without = {**SETTINGS, "teacher": None, "distill": None}
    full = filled(without, defaults(without))
    assert full["teacher"] is None
    assert full["distill"] is None


def test_names_come_from_the_data_set_where_the_config_has_none() -> None:
    data = {**SETTINGS["data"], "train": {"build": "kdmini.detection.voc:VOC", "splits": ["a"]}}
    full = filled({**SETTINGS, "data": data}, defaults({**SETTINGS, "data": data}))
    for section in (full["student"], full["metric"], full["data"]["train"]):
        assert "names" not in section


@pytest.mark.parametrize("script", [train_script, eval_script], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("options", "setting"),
    [
        (["--epochs", "3"], "train.epochs=3"),
        (["--lr0=0.02"], "train.lr0=0.02"),
        (["--img-sz", "320", "seed=1"], "data.imgsz=320"),
        (["--device", "cpu"], "device=cpu"),
        (["--patience"], "train.patience=VALUE"),
        (["--zzzz", "3"], "key.path=value"),
    ],
)
def test_an_option_that_is_none_is_answered_with_the_setting(
    script, options: list[str], setting: str, capsys
) -> None:
    with pytest.raises(SystemExit) as left:
        run(script, "--config", "configs/demo.yaml", *options)
    assert left.value.code == 2
    told = capsys.readouterr().err
    assert told.endswith(f"is no option; a setting is written as {setting}\n")
