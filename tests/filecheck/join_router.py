# RUN: moe-opt %s -p fuse-experts,fuse-router,join-router | FileCheck %s
import torch
from torch import nn
from torch.nn import functional as F


class Softmax(nn.Module):
    """Nothing reads weights and ids but the experts: E=4 K=2 H=16 F=24."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.randn(4, 16))
        self.up = nn.Parameter(torch.randn(4, 24, 16))
        self.down = nn.Parameter(torch.randn(4, 16, 24))

    def forward(self, x):
        logits = F.linear(x, self.gate)
        weights, ids = torch.topk(logits.softmax(-1), 2)
        h = F.relu(torch.einsum("th,tkfh->tkf", x, self.up[ids]))
        return (torch.einsum("tkf,tkhf->tkh", h, self.down[ids]) * weights.unsqueeze(-1)).sum(1), logits


def example():
    return Softmax(), (torch.randn(5, 16),)


# CHECK-LABEL: // after join-router
# CHECK:       %[[X:[a-z0-9_]+]]: f32[5, 16] = input
# CHECK:       %[[LOGITS:[a-z0-9_]+]]: f32[5, 4] = torch.nn.functional.linear(%[[X]], %{{.*}})
# CHECK-NOT:   moe.route(
# CHECK-NOT:   moe.experts(
# CHECK:       %[[Y:[a-z0-9_]+]]: f32[5, 16] = moe.routed_experts(%[[X]], %[[LOGITS]], [%{{.*}}, %{{.*}}])
# CHECK-NEXT:      // E=4 K=2, softmax in f32, weights from score
# CHECK-NEXT:      // E=4 K=2 H=16 F=24 O=16, f32 -> f32, {{.*}}, weight on output, ids outside 0..E-1: skip
# CHECK-NEXT:      // h0 = p0[e*384 + n*16 + k], down = p1[e*384 + n*24 + k]
# CHECK-NOT:   getitem
# CHECK:       return %[[Y]], %[[LOGITS]]
