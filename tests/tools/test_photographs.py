"""Images that a user names: those that cannot be read are known."""

from pathlib import Path

import pytest
from PIL import Image

from kdmini.contracts import UserError
from kdmini.segmentation.truth import Masks
from kdmini.tools.photographs import Photographs


def test_photographs_keep_account_of_what_cannot_be_read(tmp_path: Path) -> None:
    good = tmp_path / "good.png"
    Image.new("RGB", (3, 2)).save(good)
    text = tmp_path / "text.png"
    text.write_text("a text")
    missing = tmp_path / "missing.png"
    photographs = Photographs([good, text, missing], ["one", "two", "three"], Masks)
    image, target = photographs[0]
    assert image.shape == (2, 3, 3)
    assert target == {"id": "one"}
    assert photographs.truth is Masks
    with pytest.raises(UserError, match=r"text.png: not a usable image"):
        photographs[1]
    with pytest.raises(UserError, match=r"missing.png: no such file"):
        photographs[2]
    assert [*photographs.refused.values()] == [text, missing]
