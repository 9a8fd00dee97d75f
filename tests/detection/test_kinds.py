"""Kinds of error: on paper, one by one in loops, and mended in the scene itself."""

import pytest

from kdmini.detection.kinds import KINDS, judge, kinds_of_error
from tests.detection.kinds_in_loops import ap_if_mended, is_missed, judged
from tests.detection.scenes import SCENES, detections, measure, target

CAT = 0
DOG = 1
SQUARE = [0, 0, 10, 10]
RIGHT = [20, 0, 30, 10]
FAR = [50, 50, 60, 60]
THIRD = [0, 0, 10, 10 / 3]  # of the square
NOWHERE = [80, 80, 90, 90]
HALF_THE_LEVELS = 51 / 101  # of recall, 0 to 0.5


def costs(found, truth) -> dict[str, float]:
    """Of the kinds that occur once in an image."""
    metric = measure(([detections(*found)], [truth]))
    _, rows, objects = metric.whole()
    table = kinds_of_error(judge(rows, objects))
    assert tuple(table) == KINDS
    assert {row["number"] for row in table.values()} <= {0, 1}
    assert all(row["cost"] == 0 for row in table.values() if not row["number"])
    return {kind: row["cost"] for kind, row in table.items() if row["number"]}


# --- on paper


def test_a_surer_detection_in_the_wrong_place() -> None:
    # precision is 1/2; mended it stands for the object, and the hit is left out
    found = ([THIRD, SQUARE], [0.9, 0.8], [CAT, CAT])
    assert costs(found, target("a", [SQUARE], [CAT])) == {"place": pytest.approx(0.5)}


def test_an_object_of_which_the_only_detection_is_in_the_wrong_place_is_not_missed() -> None:
    found = ([THIRD], [0.9], [CAT])
    assert costs(found, target("a", [SQUARE], [CAT])) == {"place": pytest.approx(1)}


def test_a_detection_of_the_wrong_class() -> None:
    # the cat is found by mending; dogs have no object, and count in no mean
    found = ([SQUARE], [0.9], [DOG])
    assert costs(found, target("a", [SQUARE], [CAT])) == {"class": pytest.approx(1)}


def test_a_detection_of_the_wrong_place_and_class_is_left_out() -> None:
    # dogs: precision 1/2, then 1; cats: 1
    found = ([THIRD, FAR, SQUARE], [0.9, 0.8, 0.7], [DOG, DOG, CAT])
    truth = target("a", [SQUARE, FAR], [CAT, DOG])
    assert costs(found, truth) == {"both": pytest.approx(0.25)}


def test_a_second_detection_of_an_object_is_double() -> None:
    # hit, double, hit: precision is 2/3 at the levels above one half
    found = ([SQUARE, SQUARE, RIGHT], [0.9, 0.8, 0.7], [CAT] * 3)
    truth = target("a", [SQUARE, RIGHT], [CAT, CAT])
    assert costs(found, truth) == {"double": pytest.approx((1 - HALF_THE_LEVELS) / 3)}


def test_a_detection_of_nothing_is_background() -> None:
    found = ([NOWHERE, SQUARE], [0.9, 0.8], [CAT, CAT])
    assert costs(found, target("a", [SQUARE], [CAT])) == {"background": pytest.approx(0.5)}


def test_an_object_without_a_detection_is_missed() -> None:
    found = ([SQUARE], [0.9], [CAT])
    truth = target("a", [SQUARE, RIGHT], [CAT, CAT])
    assert costs(found, truth) == {"missed": pytest.approx(1 - HALF_THE_LEVELS)}


def test_a_class_of_which_all_was_missed_is_perfect_without_it() -> None:
    assert costs(([], [], []), target("a", [SQUARE], [CAT])) == {"missed": pytest.approx(1)}


def test_a_detection_near_its_class_is_in_the_wrong_place_whatever_else_it_is_on() -> None:
    # on the dog by 0.8, on the cat by a third: it was meant to be the cat
    found = ([SQUARE], [0.9], [CAT])
    truth = target("a", [[0, 0, 10, 8], [0, 0, 10, 10 / 3]], [DOG, CAT])
    assert costs(found, truth) == {"place": pytest.approx(0.5), "missed": pytest.approx(0.5)}


@pytest.mark.parametrize("second, kind", [(SQUARE, "double"), (THIRD, "place")])
def test_errors_about_a_difficult_object_are_left_out(second: list, kind: str) -> None:
    # the first is ignored, the second is a miss before the hit
    found = ([SQUARE, second, FAR], [0.9, 0.8, 0.7], [CAT] * 3)
    truth = target("a", [SQUARE, FAR], [CAT, CAT], [True, False])
    assert costs(found, truth) == {kind: pytest.approx(0.5)}


def test_of_two_that_are_mended_for_one_object_the_surest_stays() -> None:
    # before: one hit after two misses; after: two hits, and nothing between them
    rows = detections([THIRD, THIRD, FAR], [0.9, 0.8, 0.7], [CAT] * 3)
    metric = measure(([rows], [target("a", [SQUARE, FAR], [CAT, CAT])]))
    _, found, objects = metric.whole()
    table = kinds_of_error(judge(found, objects))
    assert table["place"] == {"cost": pytest.approx(1 - HALF_THE_LEVELS / 3), "number": 2}


def test_of_nothing_there_is_no_error() -> None:
    assert costs(([], [], []), target("a", [], [])) == {}
    assert costs(([SQUARE], [0.9], [CAT]), target("a", [], [])) == {"background": 0}


# --- in loops


@pytest.mark.parametrize("name", SCENES)
def test_kinds_are_those_of_the_rules_one_detection_at_a_time(name: str) -> None:
    _, rows, objects = measure(SCENES[name]).whole()
    mine = judge(rows, objects)
    guesses, things = judged(SCENES[name])
    assert mine.kind.tolist() == [guess.kind for guess in guesses]
    place = {id(thing): number for number, thing in enumerate(things)}
    about = [place[id(guess.thing)] if guess.thing else -1 for guess in guesses]
    assert mine.about.tolist() == about
    assert mine.missed().tolist() == [is_missed(thing) for thing in things]
    assert set(mine.kind) >= {"hit", "place", "background"}  # there is something to judge


@pytest.mark.parametrize("name", SCENES)
def test_costs_are_those_of_the_mended_scene(name: str) -> None:
    metric = measure(SCENES[name])
    _, rows, objects = metric.whole()
    table = kinds_of_error(judge(rows, objects))
    before = metric.compute()["AP50"]
    assert before == pytest.approx(ap_if_mended(SCENES[name], "none"), abs=1e-12)
    for kind in KINDS:
        after = ap_if_mended(SCENES[name], kind)
        assert table[kind]["cost"] == pytest.approx(after - before, abs=1e-12), kind
