"""VOC's archives: checked, extracted whole or not at all.

The only server is our own, on the loopback address.
"""

import hashlib
import io
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from kdmini.contracts import UserError
from kdmini.detection.voc import VOC
from kdmini.tools import download as tool
from kdmini.tools.download import RELEASES, Archive, Release, WeightFile, download
from kdmini.weightfile import find

DEAD = "http://127.0.0.1:9"  # the discard port: refused at once


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        self.server.paths.append(self.path)


@pytest.fixture
def server(tmp_path):
    """A folder that is served, and the paths asked for."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = partial(Quiet, directory=folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.paths = []
        server.folder = folder
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def make_tar(path, names, split, extra=()):
    """A VOC archive in miniature -> its md5."""
    year = "VOCdevkit/VOC2007"
    content = {f"{year}/ImageSets/Main/{split}.txt": "".join(f"{name}\n" for name in names)}
    for name in names:
        content[f"{year}/Annotations/{name}.xml"] = "<annotation/>"
        content[f"{year}/JPEGImages/{name}.jpg"] = ""
    with tarfile.open(path, "w") as tar:
        for name, text in content.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
        for member in extra:
            tar.addfile(member, io.BytesIO(b"x" * member.size))
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def releases(folder, *urls, extra=()):
    """2007 in miniature: three images in two archives, written to `folder`.

    extra: further members of the second archive.
    """
    folder.mkdir(exist_ok=True)
    trainval = make_tar(folder / "trainval.tar", ["000001", "000003"], "trainval")
    test = make_tar(folder / "test.tar", ["000002"], "test", extra)
    archives = []
    for file, md5 in (("trainval.tar", trainval), ("test.tar", test)):
        size = (folder / file).stat().st_size
        archives.append(Archive(file, size, md5, [f"{url}/{file}" for url in urls]))
    return {"2007": Release(archives, 3, {"trainval": 2, "test": 1})}


def hidden(root):
    """What an extraction that was broken off would leave."""
    return list(root.rglob(".*"))


def test_archives_are_fetched_from_the_first_host_that_answers_and_joined(tmp_path, server, capsys):
    table = releases(server.folder, DEAD, server.url)
    root = tmp_path / "data"
    download(root, ["2007"], table)
    assert "VOC2007: complete, 3 annotated images (trainval 2, test 1)" in capsys.readouterr().out
    assert len(VOC(str(root), ["VOC2007/trainval", "VOC2007/test"])) == 3
    assert len(VOC(str(root), ["VOC2007/all"])) == 3
    assert server.paths == ["/trainval.tar", "/test.tar"]
    assert not hidden(root)


def test_a_second_call_asks_for_nothing(tmp_path, server):
    table = releases(server.folder, server.url)
    root = tmp_path / "data"
    download(root, ["2007"], table)
    for path in root.glob("*.tar"):
        path.unlink()
    download(root, ["2007"], table)
    assert len(server.paths) == 2
    assert not list(root.glob("*.tar"))


def test_tars_that_lie_in_root_need_no_network(tmp_path):
    root = tmp_path / "data"
    download(root, ["2007"], releases(root, DEAD))
    assert len(VOC(str(root), ["VOC2007/all"])) == 3


def test_without_network_the_message_says_what_to_put_where(tmp_path):
    table = releases(tmp_path / "elsewhere", DEAD, DEAD)
    root = tmp_path / "data"
    with pytest.raises(UserError) as error:
        download(root, ["2007"], table)
    message = str(error.value)
    assert "trainval.tar" in message
    assert table["2007"].archives[0].md5 in message
    assert str(root) in message
    assert "2 hosts tried" in message
    assert "\n" not in message


@pytest.mark.parametrize("content", [b"<html>moved</html>", b"another tar"])
def test_another_file_or_a_web_page_is_not_taken(tmp_path, server, content):
    table = releases(server.folder, server.url)
    root = tmp_path / "data"
    (server.folder / "trainval.tar").write_bytes(content)
    with pytest.raises(UserError, match="put the tar of that name, md5"):
        download(root, ["2007"], table)
    assert not (root / "trainval.tar").exists()
    assert not (root / "VOCdevkit").exists()


def member(name, kind=tarfile.REGTYPE, link=""):
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = link
    info.size = 1 if kind == tarfile.REGTYPE else 0
    return info


@pytest.mark.parametrize(
    "hostile",
    [
        [member("../../canary")],
        [member("VOCdevkit/../../../canary")],
        [member("VOCdevkit/link", tarfile.SYMTYPE, "../../.."), member("VOCdevkit/link/canary")],
        [member("VOCdevkit/link", tarfile.SYMTYPE, "/tmp")],
        [member("VOCdevkit/link", tarfile.LNKTYPE, "../../../canary")],
        [member("VOCdevkit/device", tarfile.CHRTYPE)],
    ],
)
def test_a_hostile_tar_leaves_nothing(tmp_path, hostile):
    root = tmp_path / "data"
    with pytest.raises(UserError, match=r"test\.tar: cannot be extracted"):
        download(root, ["2007"], releases(root, DEAD, extra=hostile))
    assert not list(tmp_path.rglob("canary"))
    assert not (root / "VOCdevkit" / "VOC2007").exists()
    assert not hidden(root)


def test_an_archive_that_lacks_images_is_refused(tmp_path):
    root = tmp_path / "data"
    whole = releases(root, DEAD)["2007"]
    larger = Release(whole.archives, 4, {"trainval": 2, "test": 1, "val": 1})
    with pytest.raises(UserError, match="annotations: 3 of 4, images: 3 of 4, val: 0 of 1"):
        download(root, ["2007"], {"2007": larger})
    assert not (root / "VOCdevkit" / "VOC2007").exists()
    assert not hidden(root)


def test_what_a_killed_run_left_is_cleared(tmp_path):
    root = tmp_path / "data"
    stale = root / "VOCdevkit/.VOC2007.part/VOCdevkit/VOC2007/Annotations/999999.xml"
    stale.parent.mkdir(parents=True)
    stale.write_text("half")
    download(root, ["2007"], releases(root, DEAD))
    assert not hidden(root)
    assert len(VOC(str(root), ["VOC2007/all"])) == 3


def test_an_incomplete_folder_is_named_and_kept(tmp_path):
    root = tmp_path / "data"
    table = releases(root, DEAD)
    download(root, ["2007"], table)
    lost = root / "VOCdevkit" / "VOC2007" / "JPEGImages" / "000002.jpg"
    lost.unlink()
    with pytest.raises(UserError, match=r"VOC2007 is incomplete \(images: 2 of 3\); move it away"):
        download(root, ["2007"], table)
    assert not lost.exists()
    assert lost.parent.is_dir()


def test_the_archives_are_those_that_torchvision_lists():
    from torchvision.datasets.voc import DATASET_YEAR_DICT

    listed = [DATASET_YEAR_DICT[key] for key in ("2007", "2007-test", "2012")]
    theirs = {entry["md5"]: entry for entry in listed}
    ours = {archive.md5: archive for release in RELEASES.values() for archive in release.archives}
    assert ours.keys() == theirs.keys()
    for md5, archive in ours.items():
        assert archive.file == theirs[md5]["filename"]
        assert theirs[md5]["url"] in archive.urls


def test_the_numbers_of_images_are_the_published_ones():
    of_2007 = RELEASES["2007"]
    assert sum(of_2007.splits.values()) == of_2007.annotations
    assert of_2007.splits["trainval"] + RELEASES["2012"].splits["trainval"] == 16_551


def test_the_command_line_asks_for_all_years_or_for_some(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(tool, "download", lambda root, sets: asked.append((root, sets)))
    tool.main(["--root", str(tmp_path)])
    tool.main(["--root", str(tmp_path), "--sets", "2012"])
    assert asked == [(tmp_path, ["2007", "2012"]), (tmp_path, ["2012"])]


def test_what_goes_wrong_is_one_line_of_the_command_line(tmp_path):
    (tmp_path / "VOCdevkit" / "VOC2012").mkdir(parents=True)
    with pytest.raises(SystemExit, match=r"^error: .*VOC2012 is incomplete"):
        tool.main(["--root", str(tmp_path), "--sets", "2012"])


@pytest.fixture
def published(tmp_path, monkeypatch):
    """The content of a weight file that is published as yolo11s.pt; the cache is empty."""
    monkeypatch.setenv("KDMINI_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    content = b"weights" * 1000
    file = WeightFile(len(content), hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(tool, "WEIGHTS", {"yolo11s.pt": file})
    return content


def test_weights_go_where_a_config_finds_them(published, server, capsys):
    (server.folder / "yolo11s.pt").write_bytes(published)
    tool.download_weights(["yolo11s.pt"], f"{server.url}/")
    assert find("yolo11s.pt").read_bytes() == published
    assert "complete, 7,000 bytes" in capsys.readouterr().out


def test_other_weights_are_not_taken(published, server, tmp_path):
    (server.folder / "yolo11s.pt").write_bytes(published[::-1])
    with pytest.raises(UserError, match="another file came"):
        tool.download_weights(["yolo11s.pt"], f"{server.url}/")
    assert not (tmp_path / "cache/yolo11s.pt").exists()


def test_nothing_to_download_is_an_error(capsys):
    with pytest.raises(SystemExit):
        tool.main([])
    assert "--root" in capsys.readouterr().err
