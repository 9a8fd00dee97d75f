"""Classification: what an image is of, data sets, networks, and their metric.

`truth` says what targets and predictions hold, `folders` and `cifar` read data sets;
`accuracy` scores. `classifier` is what the networks share: `resnet`, torchvision's, and
`wide_resnet`.
"""
