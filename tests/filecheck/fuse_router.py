# RUN: moe-opt %s -p fuse-experts,fuse-router | FileCheck %s
import torch
from torch import nn
from torch.nn import functional as F


class SigmoidWithBias(nn.Module):
    """A bias helps to choose and does not weigh; the weights of the chosen are made to sum to 1: E=8 K=2 H=16 F=24."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.randn(8, 16))
        self.register_buffer("bias", torch.randn(8))
        self.up = nn.Parameter(torch.randn(8, 24, 16))
        self.down = nn.Parameter(torch.randn(8, 16, 24))

    def forward(self, x):
        score = F.linear(x, self.gate).sigmoid()
        ids = torch.topk(score + self.bias, 2).indices
        weights = score.gather(1, ids)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * 2.5
        h = F.relu(torch.einsum("th,tkfh->tkf", x, self.up[ids]))
        return (torch.einsum("tkf,tkhf->tkh", h, self.down[ids]) * weights.unsqueeze(-1)).sum(1)


def example():
    return SigmoidWithBias(), (torch.randn(5, 16),)


# CHECK-LABEL: // after fuse-experts
# CHECK:       = torch.topk(
# CHECK:       moe.experts(

# CHECK-LABEL: // after fuse-router
# CHECK:       %[[BIAS:[a-z0-9_]*bias[a-z0-9_]*]]: f32[8] = input
# CHECK:       %[[LOGITS:[a-z0-9_]+]]: f32[5, 8] = torch.nn.functional.linear(
# CHECK-NOT:   torch.topk
# CHECK:       %[[R:[a-z0-9_]+]]: (f32[5, 2], i64[5, 2]) = moe.route(%[[LOGITS]], %[[BIAS]])
# CHECK-NEXT:  // E=8 K=2, sigmoid in f32, selection bias, weights from score: {{.*}}
# CHECK-NEXT:  %[[W:[a-z0-9_]+]]: f32[5, 2] = getitem(%[[R]], 0)
# CHECK-NEXT:  %[[I:[a-z0-9_]+]]: i64[5, 2] = getitem(%[[R]], 1)
# CHECK-NEXT:  %[[Y:[a-z0-9_]+]]: f32[5, 16] = moe.experts(%{{.*}}, %[[W]], %[[I]], [
# CHECK:       return %[[Y]]
