"""A detector after DETR: convolutions, a transformer whose decoder asks for objects, and a matcher.

Which query answers for which object is decided by the values of a cost matrix, object by object,
as scipy's Hungarian method does it for the original: no compiled program can. So the matching loss
is a module of its own, which stays one call of this code.

p2bw compile detr.py --gpus 3
"""

from itertools import permutations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZE, WIDTH, QUERIES, CLASSES, OBJECTS = 32, 32, 5, 4, 2


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, WIDTH, 1),
        )
        side = SIZE // 4
        self.rows = nn.Parameter(torch.rand(side, WIDTH // 2))
        self.columns = nn.Parameter(torch.rand(side, WIDTH // 2))
        self.queries = nn.Embedding(QUERIES, WIDTH)
        self.transformer = nn.Transformer(WIDTH, 4, 2, 2, 2 * WIDTH, batch_first=True)
        self.kinds = nn.Linear(WIDTH, CLASSES + 1)  # the last: no object
        self.boxes = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 4))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = self.backbone(images).flatten(2).transpose(1, 2)
        side = len(self.rows)
        columns = self.columns.unsqueeze(0).expand(side, -1, -1)
        rows = self.rows.unsqueeze(1).expand(-1, side, -1)
        x = x + torch.cat((columns, rows), dim=-1).flatten(0, 1)
        asked = self.queries.weight.unsqueeze(0).expand(len(images), -1, -1)
        x = self.transformer(x, asked)
        return self.kinds(x), self.boxes(x).sigmoid()


class SetLoss(nn.Module):
    """Cross entropy and distance, with each object given to the query that suits it best."""

    def forward(self, logits: Tensor, boxes: Tensor, kinds: Tensor, places: Tensor) -> Tensor:
        probability = logits.softmax(-1).gather(2, kinds.unsqueeze(1).expand(-1, QUERIES, -1))
        costs = (torch.cdist(boxes, places, p=1) - probability).detach()
        losses = []
        for image, cost in enumerate(costs.tolist()):
            chosen = min(
                permutations(range(QUERIES), OBJECTS),
                key=lambda queries: sum(cost[q][i] for i, q in enumerate(queries)),
            )
            wanted = torch.full((QUERIES,), CLASSES, device=logits.device)
            wanted[list(chosen)] = kinds[image]
            losses.append(F.cross_entropy(logits[image], wanted))
            losses.append(F.l1_loss(boxes[image, list(chosen)], places[image]))
        return torch.stack(losses).sum() / len(costs)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.detector = Detector()
        self.criterion = SetLoss()

    def forward(self, images: Tensor, kinds: Tensor, places: Tensor) -> Tensor:
        return self.criterion(*self.detector(images), kinds, places)


def model() -> Model:
    return Model()


def inputs(batch_size: int) -> dict[str, Tensor]:
    return {
        "images": torch.randn(batch_size, 3, SIZE, SIZE),
        "kinds": torch.randint(CLASSES, (batch_size, OBJECTS)),
        "places": torch.rand(batch_size, OBJECTS, 4),
    }
