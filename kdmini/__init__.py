"""kdmini: distil YOLO11m into YOLO11s by attention transfer, in plain PyTorch."""

__version__ = "0.1.0"
