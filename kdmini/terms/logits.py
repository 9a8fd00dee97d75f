"""Logit distillation: class scores follow the teacher's, both softened.

Sources: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, section 2,
for the softmax and tau^2; Yang et al., "Bridging Cross-task Protocol Inconsistency for
Distillation in Dense Object Detection", ICCV 2023, for one binary problem a class, as
YOLO's head has it.
Legend: N images, A cells of all levels (a one of them), K classes (k one of them), s_a and
t_a the K class logits of student and teacher, tau the temperature.

    w_a = max_k sigmoid(t_ak)
    L   = tau^2 * sum_a w_a^gamma * KL(pi(t_a / tau) || pi(s_a / tau)) / sum_a w_a^gamma
    pi  = softmax over the classes, or one sigmoid a class, and KL then their sum

Both sums go over all images and cells; with `reduction: sample` over the cells of an
image, and L is the mean over the images.
Simplified: w is the teacher's confidence, where Yang et al. weigh by the difference of
the scores. `form: softmax` with `gamma: 0` is the loss of the research notes:
`batchmean` over rows of classes.
Reads the class maps that the models offer, `class_maps(preds)`, and so serves every task.
With `classes: by_name` k runs over the classes that both networks have: where classes are
added, the network of before teaches those that it knows.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from kdmini.bounds import Power, Temperature
from kdmini.contracts import Targets, UserError, View
from kdmini.terms.pairs import (
    Reduction,
    class_logits,
    confidence,
    sigmoid_kl,
    softmax_kl,
    weighted_mean,
)


class LogitDistillation(nn.Module):
    """The divergence of the class scores, a mean weighted by the teacher's confidence.

    form: `sigmoid` for heads that score each class by itself, `softmax` for one
        distribution over the classes.
    temperature: tau, which the logits of both networks are divided by.
    gamma: power of the confidence; 0 counts all cells alike.
    reduction: `batch`, one mean over the cells of all images of a batch; `sample`, a mean
        for each image, which accumulation does not change.
    classes: `same`, all, which both networks have in one order; or `by_name`, those that
        both have.
    """

    uses = frozenset({"classes"})
    rows: Tensor  # of student and teacher, (classes that both have, 2)

    def __init__(
        self,
        form: Literal["sigmoid", "softmax"] = "sigmoid",
        temperature: Temperature = 4.0,
        gamma: Power = 1.0,
        reduction: Reduction = "batch",
        classes: Literal["same", "by_name"] = "same",
        names: Sequence[str] = (),
        teacher_names: Sequence[str] = (),
    ):
        super().__init__()
        self.by_name = classes == "by_name"
        shared = [name for name in names if name in teacher_names] if self.by_name else names
        if self.by_name and not shared:
            raise UserError("distill: classes: by_name, but student and teacher share no class")
        if form == "softmax" and len(shared) == 1:
            raise UserError(
                "distill: softmax over one class is 1 whatever the logits, so the term has no "
                "gradient; use form: sigmoid"
            )
        rows = [[names.index(name), teacher_names.index(name)] for name in shared if self.by_name]
        self.register_buffer("rows", torch.tensor(rows), persistent=False)
        self.form = form
        self.temperature = temperature
        self.gamma = gamma
        self.reduction = reduction

    def forward(self, student: View, teacher: View, targets: Targets) -> Tensor:
        s = class_logits(student)  # (N, K, A)
        t = class_logits(teacher).detach()
        if self.by_name:
            s = s[:, self.rows[:, 0]]
            t = t[:, self.rows[:, 1]]
        if self.form == "softmax":
            divergence = softmax_kl(s, t, 1, self.temperature)
        else:
            divergence = sigmoid_kl(s, t, self.temperature).sum(1)
        weight = confidence(t) ** self.gamma
        return weighted_mean(divergence, weight, self.reduction)  # both (N, A)
