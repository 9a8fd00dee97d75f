"""Cross-head distillation (CrossKD): the teacher's head judges the student's features.

Source: Wang et al., "CrossKD: Cross-Head Knowledge Distillation for Object Detection", CVPR
2024, from the paper, not from its code. A map inside the student's head goes through what
follows in the teacher's, and that prediction, not the student's own, is to be the teacher's: so
the student's last layers hear the boxes alone.
Legend: N images, C channels, A cells of all levels (a one of them), K classes (k one of them),
R bins (`reg_max`), e one of the four sides, p_ak and q_ak the class logits, p_ae and q_ae the R
logits of a side, p of the teacher's head on the teacher's maps, q of the teacher's head on the
student's, sg a sigmoid.

    w_a = max_k sg(p_ak)
    L   = sum_ak |sg(p_ak) - sg(q_ak)|^gamma BCE(q_ak, sg(p_ak)) / sum_a w_a
        + sum_a w_a mean_e KL(softmax(p_ae) || softmax(q_ae)) / sum_a w_a

The sums go over all images and cells; with `reduction: sample` over the cells of an image, and
L is the mean over the images. The first is the quality focal loss, the second that of
localisation distillation, as the paper has them for GFL.
Simplified: w stands for the positive cells, which it counts and where sides are compared.
A tap is a layer of a branch of the head, a Sequential; the branch goes on after it.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdmini.bounds import Power
from kdmini.contracts import Targets, UserError, View
from kdmini.distill.align import Shapes
from kdmini.terms.pairs import EPS, Reduction, aligned, confidence, softmax_kl, wide

SIDES = 4  # of a box


class CrossHead(nn.Module):
    """The divergence of what the teacher's head makes of both networks' maps.

    gamma: power of the difference of the scores; 0 counts all cells and classes alike.
    sides: what is in the name of a tap that belongs to the sides of the boxes; the others
        belong to the classes.
    reduction: `batch`, one mean over the cells of all images of a batch; `sample`, a mean
        for each image, which accumulation does not change.
    """

    uses = frozenset({"feats", "preds"})  # the taps are inside the head, which has to run

    def __init__(
        self,
        shapes: Shapes,
        teacher: nn.Module | None = None,
        gamma: Power = 1.0,
        sides: str = "cv2",
        reduction: Reduction = "batch",
    ):
        super().__init__()
        self.gamma = gamma
        self.sides = sides
        self.reduction = reduction
        # functions hide the teacher's layers from nn.Module
        self.rest: dict[str, Callable[[Tensor], Tensor]] = {}
        if teacher is None:  # it is asked for by name, later
            return
        for tap in shapes:
            self.rest[tap] = rest_of(teacher, tap)
        if not [tap for tap in shapes if sides not in tap]:
            raise UserError(
                "distill.taps: cross-head distillation reads layers of the head's branches, "
                "those of the classes at least: name some, as model.23.cv3.0.0"
            )

    def forward(self, student: View, teacher: View, targets: Targets) -> Tensor:
        pairs = aligned(student, teacher)
        with torch.no_grad():
            goals = {tap: self.ended(tap, teacher.feats[tap]) for tap in pairs}
        guesses = {tap: self.ended(tap, student.feats[tap]) for tap in pairs}

        of_classes = [tap for tap in pairs if self.sides not in tap]
        weights = {}  # (H, W) -> (N, H, W)
        for tap in of_classes:
            weights[tuple(goals[tap].shape[2:])] = confidence(goals[tap])

        each = []  # of each tap, (N,)
        for tap, goal in goals.items():
            if tap in of_classes:
                difference = quality_focal(guesses[tap], goal, self.gamma)
            else:
                weight = weights.get(tuple(goal.shape[2:]))
                if weight is None:
                    raise UserError(f"distill.taps: {tap} has no tap of the classes at its level")
                difference = weight * side_divergence(guesses[tap], goal)
            each.append(difference.flatten(1).sum(1))
        total = torch.stack(each).sum(0)
        whole = torch.stack([weight.sum((1, 2)) for weight in weights.values()]).sum(0)
        if self.reduction == "batch":
            return total.sum() / whole.sum().clamp(min=EPS)
        return (total / whole.clamp(min=EPS)).mean()

    def ended(self, tap: str, feat: Tensor) -> Tensor:
        """The branch of the teacher's head from the tap on: (N, C, H, W) -> logits."""
        return wide(self.rest[tap](feat))


def rest_of(network: nn.Module, tap: str) -> Callable[[Tensor], Tensor]:
    """What follows a layer in its Sequential. Raises UserError where nothing does."""
    parent, _, last = tap.rpartition(".")
    branch = dict(network.named_modules()).get(parent)
    if not isinstance(branch, nn.Sequential) or not last.isdigit():
        raise UserError(
            f"distill.taps: {tap} is no layer of a Sequential of the teacher's; name layers of "
            "the head's branches, as model.23.cv3.0.0"
        )
    layers = branch[int(last) + 1 :]
    if not len(layers):
        raise UserError(f"distill.taps: {tap} is the last of its branch; name one before it")

    def run(feat: Tensor) -> Tensor:
        return layers(feat)

    return run


def quality_focal(guess: Tensor, goal: Tensor, gamma: float) -> Tensor:
    """Of class logits, one by one: the shape stays."""
    target = goal.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(guess, target, reduction="none")
    return (guess.sigmoid() - target).abs() ** gamma * entropy


def side_divergence(guess: Tensor, goal: Tensor) -> Tensor:
    """(N, 4R, H, W) -> (N, H, W): a mean over the sides."""
    shape = (SIDES, goal.shape[1] // SIDES)
    return softmax_kl(guess.unflatten(1, shape), goal.unflatten(1, shape), 2, 1.0).mean(1)
