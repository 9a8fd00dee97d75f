"""Detect objects in pictures and videos, label their pixels, or say their class.

python -m kdmini.tools.predict WEIGHTS IMAGE|FOLDER|VIDEO|CAMERA|- ...
    [--out FOLDER]
python -m kdmini.tools.predict runs/voc/best.pt photographs/ --recursive
python -m kdmini.tools.predict runs/voc/best.pt clip.mp4 --jsonl - --no-pictures

CAMERA is its number, such as 0; it is watched until Ctrl-C. For `-` the names
of files are read from the standard input, one a line. Videos need PyAV: pip
install -e '.[video]'.

Of a detector FOLDER then holds each picture with its boxes, NAME.jpg; of a
network for segmentation the index of a class for each pixel of the file,
NAME.png with VOC's palette, and the same over the picture, NAME.jpg; of a
classifier each picture with its class and the score, NAME.jpg. Of a video the
pictures are one film, NAME.mp4, without sound.

Beside them is predictions.json, or JSON lines where --jsonl says: for every
image its file, width, height, what was written of it, and the detections as
box_xyxy (pixels of the file), label and score, best first; or the classes and
their shares of the pixels; or the best five classes and their scores, best
first. An image of a video also has its number, `frame`, and its time in
`seconds`, both from 0. In a name of a file that is not UTF-8 the other bytes
stand as JSON's \\udc80 to \\udcff, which Python turns back into that very name.

Pictures are turned as EXIF asks for it, and videos as players turn them, so
width, height and boxes are those that people see; training takes pixels as they
are stored.

Ctrl-C ends it after the images at hand: what was found until then is written
whole.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from pathlib import Path

from kdmini import memory, output, signals
from kdmini.bounds import ImageSize, Share
from kdmini.contracts import UserError
from kdmini.tools.entries import Add, in_lines, in_list, on_stream
from kdmini.tools.photographs import check_results, find_images, listed, prepare
from kdmini.tools.predict_job import Job
from kdmini.tools.predictor import Predictor
from kdmini.tools.video import is_camera, is_video, pyav
from kdmini.typed import argument

STREAM = "-"  # the standard output, as the name of a file


def predict(
    predictor: Predictor,
    inputs: Sequence[str],
    out: Path,
    recursive: bool = False,
    pictures: bool = True,
    jsonl: str | None = None,
) -> int:
    """Writes pictures to `out` -> how many inputs could not be used, or not to their end.

    Each of these was named. recursive: look into the folders of a folder. jsonl: where the
    entries go; None for `out`/predictions.json. Raises UserError where no image is left.
    """
    names = listed(inputs)
    videos = [name for name in dict.fromkeys(names) if is_video(name)]
    paths, refused = find_images([name for name in names if not is_video(name)], recursive, out)
    if not paths and not videos:
        why = "each folder is named above" if refused else "the list is empty"
        raise UserError(f"no image to look at; {why}")
    for name in videos[:1]:
        pyav(name)
    files = [*paths, *(Path(name) for name in videos if not is_camera(name))]
    saves = hasattr(predictor.writer, "save")
    made = ["pictures"] * pictures + ["masks"] * saves + ["predictions.json"] * (jsonl is None)
    if made:
        prepare(out, files)
    if jsonl is not None and jsonl != STREAM:
        check_results(Path(jsonl), files)

    began = time.monotonic()
    with signals.delayed() as stop:
        with results(jsonl, out) as add:
            job = Job(predictor, out, pictures, add, stop, refused=refused)
            job.look_at(paths, videos)
        speed = job.images / (time.monotonic() - began)
        where = f"; {', '.join(made)} in {out}" if made else ""
        print(
            f"{job.images:,} images, {predictor.writer.summary(job.found)}; "
            f"{speed:.1f} images/s{where}",
            file=sys.stderr if jsonl == STREAM else sys.stdout,
        )
    return job.refused


def results(jsonl: str | None, out: Path) -> AbstractContextManager[Add]:
    """What takes the entries."""
    if jsonl is None:
        return in_list(out / "predictions.json")
    return on_stream(sys.stdout) if jsonl == STREAM else in_lines(Path(jsonl))


def main(argv: list[str] | None = None) -> None:
    output.guard(needed=True)
    parser = argparse.ArgumentParser(
        prog="python -m kdmini.tools.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("weights", help="best.pt of a run, or a public file such as yolo11s.pt")
    parser.add_argument(
        "inputs", nargs="+", metavar="input", help="image, folder, video, number of a camera, or -"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("predictions"), help="default: predictions"
    )
    parser.add_argument(
        "--recursive", action="store_true", help="look into the folders of a folder, too"
    )
    parser.add_argument(
        "--jsonl",
        metavar="FILE",
        help="JSON lines in the place of predictions.json; - for the standard output",
    )
    parser.add_argument(
        "--no-pictures", dest="pictures", action="store_false", help="draw nothing; masks are saved"
    )
    parser.add_argument("--imgsz", type=argument(ImageSize), help="default: that of the training")
    parser.add_argument(
        "--score",
        type=argument(Share),
        help="objects under it are not shown; default: 0.25",
    )
    parser.add_argument(
        "--iou",
        type=argument(Share),
        help="boxes that overlap more are one; default: 0.7",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    args = parser.parse_args(argv)
    signals.exit_on_signals()
    lines_alone = redirect_stdout(sys.stderr) if args.jsonl == STREAM else nullcontext()
    try:
        with memory.bounded("lower --imgsz, or take --device cpu"):
            with lines_alone:
                predictor = Predictor(args.weights, args.imgsz, args.device, args.score, args.iou)
            refused = predict(
                predictor, args.inputs, args.out, args.recursive, args.pictures, args.jsonl
            )
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    if refused:
        sys.exit(
            "error: inputs that could not be used, or not to their end, and are named above: "
            f"{refused:,}; the others are done"
        )


if __name__ == "__main__":
    main()
