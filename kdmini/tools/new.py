"""A new project: looks at a folder of images, and writes a config that trains on
it.

python -m kdmini.tools.new FOLDER --data PATH [--task boxes | masks | classes]
    [--weights yolo11s.pt] [--teacher yolo11m.pt]

PATH holds images and what is known of them, in a layout that is found out: VOC
XML (side by side, in two folders, in train/ and valid/, in folders in folders,
or as in VOC itself), COCO JSON, YOLO text, masks in SegmentationClass, or a
folder of images for each class. Written are FOLDER/config.yaml, and
FOLDER/teacher.yaml where a larger network is trained first; printed are the
commands that follow. Nothing is written to PATH, and nothing is overwritten.
"""

import argparse
import re
import shlex
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np

from kdmini import config, output, signals
from kdmini.commands import command
from kdmini.contracts import UserError
from kdmini.detection.yolo11 import weights as weight_files
from kdmini.files import write_whole
from kdmini.sections import Sections, make_sets
from kdmini.tools.new_config import Project, Start, counted, texts
from kdmini.tools.new_layouts import Found, Task, look_at
from kdmini.tools.new_tree import tree_of
from kdmini.weightfile import PUBLIC, find
from kdmini.yamltext import parse

USUAL = "yolo11s.pt"  # what a detector begins with
LARGER = {"n": "yolo11s.pt", "s": "yolo11m.pt"}  # scale of a student -> what its teacher does
SCALE = re.compile(r"yolo11([nslmx])\.pt")


def new(
    folder: Path,
    data: Path,
    task: Task | None = None,
    weights: str | None = None,
    teacher: str | None = None,
) -> None:
    """Writes the project, and prints what follows. Raises UserError before anything is
    written. weights, teacher: what the networks begin with.
    """
    refuse_taken(folder, data)
    tree = tree_of(data)
    found = look_at(tree, [task] if task else list(get_args(Task)))
    print(f"{data}: {found.layout}, {len(found.counts)} classes; {counted(found)}")
    long_sides = tree.sizes().max(1, initial=0)
    if not long_sides.any():
        raise UserError(f"--data {data}: none of its images can be opened; replace them")
    sets = config.call(make_sets, {"root": str(data), "train": found.train, "val": found.val}, "")
    project = Project(
        folder=folder,
        root=data,
        found=found,
        images=len(sets.train),
        held_out=len(sets.val),
        sides=np.percentile(long_sides, (0, 50, 100)).astype(int).tolist(),
        **starts(found, weights, teacher),
    )
    files = texts(project)
    for name, text in files.items():
        config.call(Sections, parse(text, name), name).recipe()

    make_folder(folder)
    for name, text in files.items():
        write_whole(folder / name, text)
        print(f"written: {folder / name}")
    for line in what_follows(project, set(files)):
        print(line)


def refuse_taken(folder: Path, data: Path) -> None:
    """Raises UserError where the project would overwrite something, or lie among the images."""
    is_empty = folder.is_dir() and not any(folder.iterdir())
    if not is_empty and (folder.exists() or folder.is_symlink()):
        raise UserError(f"{folder}: exists already, and nothing is overwritten; name a new folder")
    if data.resolve() in (folder.resolve(), *folder.resolve().parents):
        raise UserError(f"{folder}: lies in --data {data}; name a folder outside of it")


def starts(found: Found, weights: str | None, teacher: str | None) -> dict[str, Any]:
    """What the networks begin with. Raises UserError for a file that is not there."""
    if found.task != "boxes":
        if teacher:
            raise UserError("--teacher: is for boxes; set student.weights in teacher.yaml")
        return {"weights": str(find(weights)) if weights else None}
    student = start(weights or USUAL)
    larger = teacher or LARGER.get(str(student.scale))
    return {"student": student, "teacher": start(larger) if larger else None}


def start(weights: str) -> Start:
    """A public file may be fetched later; of another the scale is read. Raises UserError."""
    try:
        path = find(weights)
    except UserError:
        if weights not in PUBLIC:
            raise
        return Start(scale_of(weights), weights)
    file = weight_files.read(path)
    scale = file.scale or scale_of(path.name)
    if not scale:
        raise UserError(f"{weights}: does not say its scale; name it as yolo11s.pt is named")
    return Start(scale, weights)


def scale_of(name: str) -> str:
    match = SCALE.fullmatch(name)
    return match[1] if match else ""


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror}); name another") from error


def what_follows(project: Project, files: set[str]) -> list[str]:
    """The commands, a line each."""
    own = project.folder / "config.yaml"
    quoted = shlex.quote(str(own))
    lines = []
    missing = [one.weights for one in (project.student, project.teacher) if one and absent(one)]
    if missing:
        names = " ".join(missing)
        lines.append(f"fetch:    python -m kdmini.tools.download --weights {names}")
    lines.append(f"look:     python -m kdmini.tools.look {quoted}")
    if "teacher.yaml" in files:
        path = shlex.quote(str(project.folder / "teacher.yaml"))
        lines.append(f"teacher:  {command('train')} --config {path}")
    lines.append(f"student:  {command('train')} --config {quoted}")
    if "teacher.yaml" not in files:
        best = shlex.quote(str(project.folder / "student" / "best.pt"))
        lines.append(f"evaluate: {command('eval')} --config {quoted} --weights {best}")
    return lines


def absent(one: Start) -> bool:
    try:
        find(one.weights)
    except UserError:
        return True
    return False


def main(argv: list[str] | None = None) -> None:
    output.guard(needed=True)
    parser = argparse.ArgumentParser(
        prog="python -m kdmini.tools.new",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="of the project, a new one")
    parser.add_argument("--data", metavar="PATH", type=Path, required=True, help="of the images")
    parser.add_argument(
        "--task", choices=get_args(Task), help="where PATH serves several; else the first of these"
    )
    parser.add_argument(
        "--weights", metavar="FILE", help="what the student begins with; of boxes yolo11s.pt"
    )
    parser.add_argument(
        "--teacher",
        metavar="FILE",
        help="of boxes: what the teacher begins with; the next larger of the public YOLO11",
    )
    args = parser.parse_args(argv)
    signals.exit_on_signals()
    try:
        new(args.folder, args.data.expanduser(), args.task, args.weights, args.teacher)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
