"""README.ko.md is README.md in Korean: what needs no translation is the same in both.

The sizes between marks are held to the code in tests/house/test_docs.py, and left out here.
"""

import re
from collections import Counter
from typing import NamedTuple

import pytest

from tests.house.source import ROOT

ENGLISH = (ROOT / "README.md").read_text()
KOREAN = (ROOT / "README.ko.md").read_text()
SIZE = r"(?<=-->)[\d,]+[^<]*(?=<!-- /)"
FENCED = r"^```.*?^```$"
IMAGE = r"!\[[^\]]*\]\(([^)\s]+)\)"
LINK = r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)"
SPAN = r"`[^`]+`"
NUMBER = r"\d+(?:[.,]\d+)*"
HANGUL = r"[가-힣]"
ELSEWHERE = {"README.md": "README.ko.md", "README.ko.md": "README.md"}  # each leads to the other
# numbers that English spells out and Korean may write in digits
SPELT = {"one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6"}


class Section(NamedTuple):
    """From a heading to the next one."""

    level: int
    title: str
    prose: str  # without code blocks and sizes

    def found(self, pattern: str) -> Counter[str]:
        return Counter(re.findall(pattern, self.prose))

    def words(self) -> str:
        """The prose without what is compared as it stands: targets and spans of code."""
        return re.sub(rf"\]\([^)]*\)|{SPAN}|<!--.*?-->", " ", f"{self.title}\n{self.prose}")

    def numbers(self) -> Counter[str]:
        return Counter(re.findall(NUMBER, self.words()))

    def spelt(self) -> Counter[str]:
        words = re.findall(r"[a-z]+", self.words().lower())
        return Counter(SPELT[word] for word in words if word in SPELT)

    def shape(self) -> list[str]:
        """What each paragraph is: of a list its items, of a table the cells of each row."""
        shapes = []
        for block in re.split(r"\n{2,}", self.prose.strip()):
            rows = [line.count("|") - 1 for line in block.splitlines() if line.startswith("|")]
            items = len(re.findall(r"^- ", block, re.MULTILINE))
            shapes.append(f"table {rows}" if rows else f"list {items}" if items else "text")
        return shapes


def code_blocks(page: str) -> list[str]:
    return re.findall(FENCED, page, re.DOTALL | re.MULTILINE)


def sections(page: str) -> list[Section]:
    prose = re.sub(FENCED, "(code)", page, flags=re.DOTALL | re.MULTILINE)
    prose = re.sub(SIZE, "", prose)
    _, *parts = re.split(r"^(#+) (.+)$", prose, flags=re.MULTILINE)
    headed = zip(parts[::3], parts[1::3], parts[2::3], strict=True)
    return [Section(len(marks), title, text) for marks, title, text in headed]


def differences(english: str, korean: str) -> list[str]:
    """What the two pages do not have in common, a line each."""
    if code_blocks(english) != code_blocks(korean):
        return ["code blocks"]
    ours = sections(english)
    theirs = sections(korean)
    if [one.level for one in ours] != [one.level for one in theirs]:
        return ["headings"]

    wrong = []
    for one, other in zip(ours, theirs, strict=True):
        links = Counter(ELSEWHERE.get(target, target) for target in one.found(LINK))
        checks = {
            "shape": one.shape() == other.shape(),
            "links": links == Counter([*other.found(LINK)]),
            "images": one.found(IMAGE) == other.found(IMAGE),
            "spans of code": one.found(SPAN) == other.found(SPAN),
            "marks": one.found(r"<!-- .*? -->") == other.found(r"<!-- .*? -->"),
            "numbers": one.numbers() <= other.numbers() <= one.numbers() + one.spelt(),
            "Hangul": in_korean(other),
        }
        wrong += [f"{one.title}: {name}" for name, holds in checks.items() if not holds]
    return wrong


def in_korean(section: Section) -> bool:
    """Whether every paragraph is, but code and the line that leads to the other page."""
    blocks = re.split(r"\n{2,}", section.prose.strip())
    prose = [block for block in blocks if block not in ("(code)", "[English](README.md)", "")]
    return all(re.search(HANGUL, block) for block in prose)


def test_the_two_pages_are_one() -> None:
    assert differences(ENGLISH, KOREAN) == []


def test_there_is_something_to_compare() -> None:
    found = sections(ENGLISH)
    assert len(found) > 8
    assert len(code_blocks(ENGLISH)) > 5
    assert sum(one.found(LINK).total() for one in found) > 20
    assert sum(one.numbers().total() for one in found) > 20


@pytest.mark.parametrize(
    "here, there, what",
    [
        ("## 결과\n", "### 결과\n", "headings"),
        ("## 결과\n", "결과\n", "headings"),
        ("make demo    #", "make demo   #", "code blocks"),
        ("```yaml", "```yml", "code blocks"),
        ("| `kdmini/distill/` | 탭, ", "| `kdmini/distill/` | 탭 | ", "shape"),
        ("- **안전합니다.**", "**안전합니다.**", "shape"),
        ("(docs/speed.md)", "(docs/step.md)", "links"),
        ("classification.md#what-helped", "classification.md", "links"),
        ("[English](README.md)", "[English](README.ko.md)", "links"),
        ("pictures/attention.png", "pictures/taps.png", "images"),
        ("`--weights`", "`--weight`", "spans of code"),
        ("<!-- /terms -->", "", "marks"),
        ("3.5점", "3.6점", "numbers"),
        ("1~2분", "1~3분", "numbers"),
        ("사진 400장에서 ", "", "numbers"),
        ("95 % 구간", "95 %, 99 % 구간", "numbers"),
    ],
)
def test_a_difference_would_be_seen(here: str, there: str, what: str) -> None:
    changed = KOREAN.replace(here, there, 1)
    assert changed != KOREAN
    assert any(line.endswith(what) for line in differences(ENGLISH, changed))


def test_a_paragraph_left_in_english_would_be_seen() -> None:
    untranslated = ENGLISH.partition("## Licences\n")[2]
    changed = KOREAN.partition("## 라이선스\n")[0] + "## 라이선스\n" + untranslated
    assert differences(ENGLISH, changed) == ["Licences: Hangul"]


def test_a_page_that_grows_alone_would_be_seen() -> None:
    """Prose without a number or a link among it."""
    grown = ENGLISH.replace("\n## Results\n", "\nMore.\n\n## Results\n")
    assert differences(grown, KOREAN) == ["The run on VOC: shape"]
