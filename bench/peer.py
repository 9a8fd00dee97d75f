"""ultralytics (AGPL-3.0), taking part in the comparisons where it can be imported.

Its loader, its distillation and its evaluation, called as its own trainer calls them.
Nothing of kdmini needs it. Every entry raises ImportError where it is not installed;
whatever it writes, it writes to `scratch`.
Legend: N images of a batch, S image size, G objects of an image, D detections, A boxes,
K classes, T thresholds of IoU.
"""

import io
import os
import random
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from kdmini.data.loader import Augment
from kdmini.data.pictures import shrink
from kdmini.data.store import subset
from kdmini.detection.truth import Detections, Target, Targets
from kdmini.detection.voc import VOC, VOC_NAMES

# of Augment; its settings have the same names
STRENGTHS = ("mosaic", "translate", "scale", "fliplr", "hsv_h", "hsv_s", "hsv_v")

# of its thresholds of IoU
AT_50 = 0
AT_75 = 5


def version(scratch: Path) -> str:
    """Call it before anything else of ultralytics is imported.

    For it reads its settings from the environment at that moment.
    """
    os.environ["YOLO_CONFIG_DIR"] = str(scratch)
    os.environ["MPLCONFIGDIR"] = str(scratch)
    os.environ["YOLO_VERBOSE"] = "false"
    os.environ["YOLO_OFFLINE"] = "true"
    os.environ["YOLO_AUTOINSTALL"] = "false"
    from ultralytics import __version__

    return f"ultralytics {__version__}"


class PeerStep:
    """A step of its built-in distillation, of YOLO11m into YOLO11s, on one batch.

    images: (N, 3, S, S).
    """

    def __init__(self, images: Tensor, targets: Targets, scratch: Path):
        self.name = version(scratch)
        from ultralytics.cfg import get_cfg
        from ultralytics.nn.distill_model import DistillationModel
        from ultralytics.nn.tasks import DetectionModel

        imgsz = images.shape[-1]

        def build(scale: str) -> DetectionModel:
            model = DetectionModel(f"yolo11{scale}.yaml", nc=len(VOC_NAMES), verbose=False)
            model.to(images.device)
            model.args = get_cfg(overrides={"imgsz": imgsz})
            return model

        torch.manual_seed(0)
        self.model = DistillationModel(build("m"), build("s")).train()
        n, g = targets["labels"].shape
        shares = (targets["boxes_xyxy"] / imgsz).flatten(0, 1)  # (N * G, 4)
        left_top, right_bottom = shares.split(2, 1)
        centre = (left_top + right_bottom) / 2
        sides = right_bottom - left_top
        self.batch = {
            "img": images,
            "batch_idx": torch.arange(n, device=images.device).repeat_interleave(g).float(),
            "cls": targets["labels"].reshape(-1, 1).float(),
            "bboxes": torch.cat([centre, sides], 1),
        }

    def step(self) -> None:
        """One forward and backward pass."""
        images = self.batch["img"]
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
            loss, _ = self.model(self.batch)
        loss.sum().backward()
        self.model.zero_grad()


def peer_loaders(
    dataset: VOC, images: int, imgsz: int, batch: int, augment: Augment, scratch: Path
) -> dict[str, Callable[[], Iterator[Tensor]]]:
    """-> epochs of its augmented batches (N, 3, S, S) in 0..1.

    One decodes each time, one has cache=ram.
    """
    name = version(scratch)
    import cv2
    from ultralytics.cfg import get_cfg
    from ultralytics.data.dataset import YOLODataset

    cv2.setNumThreads(0)
    random.seed(0)
    write_yolo(dataset, images, scratch)
    recipe = get_cfg(overrides={name: getattr(augment, name) for name in STRENGTHS})

    def epoch_of(cache: str | bool) -> Callable[[], Iterator[Tensor]]:
        with redirect_stdout(io.StringIO()):  # its progress bar
            samples = YOLODataset(
                img_path=str(scratch / "images"),
                imgsz=imgsz,
                cache=cache,
                augment=True,
                hyp=recipe,
                # its buffer is of eight batches: half the dataset here
                batch_size=max(min(batch, images // 16), 1),
                data={"names": dict(enumerate(dataset.names)), "channels": 3},
            )
        assert len(samples) == images
        assert samples.cache == (cache or None)
        # in order, so that no file is still in the buffer when its turn comes
        loader = DataLoader(samples, batch, collate_fn=samples.collate_fn)
        return lambda: (collated["img"].float() / 255 for collated in loader)

    return {f"{name}, cache off": epoch_of(False), f"{name}, cache=ram": epoch_of("ram")}


def write_yolo(dataset: VOC, images: int | None, folder: Path, imgsz: int | None = None) -> None:
    """The images that a Store of the dataset has, as links, and their labels as text.

    imgsz: images with a longer side are written reduced to it, by the Store's reduction,
    in place of a link.
    """
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    for index in subset(len(dataset), images):
        picture, target = dataset[index]
        source = Path(dataset.records[index].image)
        reduced = shrink(picture, imgsz) if imgsz else picture
        if reduced is picture:
            (folder / "images" / f"{index:06}{source.suffix}").symlink_to(source)
        else:
            Image.fromarray(reduced).save(folder / "images" / f"{index:06}.png")
        height, width = picture.shape[:2]
        labels = "".join(yolo_lines(target, width, height))
        (folder / "labels" / f"{index:06}.txt").write_text(labels)


def yolo_lines(target: Target, width: int, height: int) -> Iterator[str]:
    """Class, centre and sides, as shares, of each object that is not difficult."""
    shares = (target["boxes_xyxy"] / (width, height, width, height)).reshape(-1, 2, 2)
    low = shares[:, 0]
    high = shares[:, 1]
    rows = zip(target["labels"], (low + high) / 2, high - low, target["difficult"], strict=True)
    for label, (x, y), (w, h), difficult in rows:
        if not difficult:
            yield f"{label} {x:.6f} {y:.6f} {w:.6f} {h:.6f}\n"


class PeerMetric:
    """Its average precision, without the per-image figures of its validator."""

    def __init__(self, scratch: Path):
        self.name = version(scratch)
        from ultralytics.models.yolo.detect import DetectionValidator
        from ultralytics.utils.metrics import ap_per_class, box_iou

        self.validator = DetectionValidator(save_dir=scratch)
        self.ap_per_class = ap_per_class
        self.box_iou = box_iou

    def compute(
        self, detections: list[Detections], objects: list[tuple[Tensor, Tensor]]
    ) -> dict[str, float]:
        """objects: boxes_xyxy (G, 4) and labels (G,) of each image."""
        columns = []
        for seen, (boxes_xyxy, labels) in zip(detections, objects, strict=True):
            iou = self.box_iou(boxes_xyxy, seen["boxes_xyxy"])
            hit = self.validator.match_predictions(seen["labels"], labels, iou)
            tensors = (hit, seen["scores"], seen["labels"], labels)
            columns.append([tensor.numpy() for tensor in tensors])
        joined = [np.concatenate(column) for column in zip(*columns, strict=True)]
        ap = self.ap_per_class(*joined, names=dict(enumerate(VOC_NAMES)))[5]  # (K, T)
        return {
            "AP50-95": float(ap.mean()),
            "AP50": float(ap[:, AT_50].mean()),
            "AP75": float(ap[:, AT_75].mean()),
        }


class PeerNMS:
    """Its non-maximum suppression of one image."""

    def __init__(self, scratch: Path):
        self.name = version(scratch)
        from ultralytics.utils.nms import non_max_suppression

        self.run = non_max_suppression

    @staticmethod
    def prediction(boxes_xyxy: Tensor, scores: Tensor) -> Tensor:
        """(A, 4), (A, K) -> (1, 4 + K, A), centres and sides, as its head gives it."""
        sides = boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]
        centre = boxes_xyxy[:, :2] + sides / 2
        return torch.cat([centre, sides, scores], 1).T[None].contiguous()

    def select(self, prediction: Tensor, score: float, iou: float, max_det: int) -> Tensor:
        """-> (D, 6): box, score, label."""
        return self.run(prediction, score, iou, multi_label=True, max_det=max_det)[0]
