# RUN: moe-opt %s -p fuse-experts,fuse-router | FileCheck %s
import torch
from torch import nn
from torch.nn import functional as F


class SquareRoots(nn.Module):
    """The weights are square roots of probabilities, which no router form has: the experts are fused alone.  E=8 K=2 H=16 F=24."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.randn(8, 16))
        self.up = nn.Parameter(torch.randn(8, 24, 16))
        self.down = nn.Parameter(torch.randn(8, 16, 24))

    def forward(self, x):
        weights, ids = torch.topk(F.linear(x, self.gate).softmax(-1), 2)
        weights = weights.sqrt()
        h = F.relu(torch.einsum("th,tkfh->tkf", x, self.up[ids]))
        return (torch.einsum("tkf,tkhf->tkh", h, self.down[ids]) * weights.unsqueeze(-1)).sum(1)


def example():
    return SquareRoots(), (torch.randn(5, 16),)


# CHECK-LABEL: // after fuse-router
# CHECK-NOT:   moe.route
# CHECK:       %[[TOP:[a-z0-9_]+]]: (f32[5, 2], i64[5, 2]) = torch.topk(
# CHECK:       %[[I:[a-z0-9_]+]]: i64[5, 2] = getitem(%[[TOP]], 1)
# CHECK-NOT:   moe.route
# CHECK:       f32[5, 2] = .sqrt(
# CHECK:       %[[Y:[a-z0-9_]+]]: f32[5, 16] = moe.experts(%{{.*}}, %{{.*}}, %[[I]], [
# CHECK:       return %[[Y]]
