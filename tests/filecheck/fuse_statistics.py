# RUN: moe-opt %s -p fuse-experts,fuse-router,fuse-statistics | FileCheck %s
import torch
from torch import nn
from torch.nn import functional as F


class Balanced(nn.Module):
    """The layer's output, Switch's balancing loss and ST-MoE's z-loss: E=8 K=2 H=16 F=24, 5 tokens."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.randn(8, 16))
        self.up = nn.Parameter(torch.randn(8, 24, 16))
        self.down = nn.Parameter(torch.randn(8, 16, 24))

    def forward(self, x):
        logits = F.linear(x, self.gate)
        weights, ids = torch.topk(logits.softmax(-1), 2)
        h = F.relu(torch.einsum("th,tkfh->tkf", x, self.up[ids]))
        y = (torch.einsum("tkf,tkhf->tkh", h, self.down[ids]) * weights.unsqueeze(-1)).sum(1)
        chosen = F.one_hot(ids, 8).sum(1).float().mean(0)
        mean = F.softmax(logits, dim=-1).mean(0)
        z = torch.logsumexp(logits, -1).square().sum()
        return y, 8 * (chosen * mean).sum(), z


def example():
    return Balanced(), (torch.randn(5, 16),)


# CHECK-LABEL: // after fuse-router
# CHECK:       moe.route(
# CHECK:       one_hot
# CHECK:       softmax
# CHECK:       logsumexp

# CHECK-LABEL: // after fuse-statistics
# CHECK:       %[[LOGITS:[a-z0-9_]+]]: f32[5, 8] = torch.nn.functional.linear(
# CHECK-NOT:   f32[5, 8]
# CHECK-NOT:   moe.route(
# CHECK:       %[[R:[a-z0-9_]+]]: (f32[5, 2], i64[5, 2], i64[8], f32[8], f32[]) = moe.route_stats(%[[LOGITS]])
# CHECK-NEXT:  // E=8 K=2, softmax in f32, weights from score
# CHECK-NEXT:  %[[N:[a-z0-9_]+]]: i64[8] = getitem(%[[R]], 2)
# CHECK-NEXT:  %[[FLOAT:[a-z0-9_]+]]: f32[8] = .to(%[[N]], f32)
# CHECK-NEXT:  %[[CHOSEN:[a-z0-9_]+]]: f32[8] = truediv(%[[FLOAT]], 5)
# CHECK-NEXT:  %[[SUM:[a-z0-9_]+]]: f32[8] = getitem(%[[R]], 3)
# CHECK-NEXT:  %[[MEAN:[a-z0-9_]+]]: f32[8] = truediv(%[[SUM]], 5)
# CHECK-NEXT:  %[[Z:[a-z0-9_]+]]: f32[] = getitem(%[[R]], 4)
# CHECK-NEXT:  %[[W:[a-z0-9_]+]]: f32[5, 2] = getitem(%[[R]], 0)
# CHECK-NEXT:  %[[I:[a-z0-9_]+]]: i64[5, 2] = getitem(%[[R]], 1)
# CHECK-NEXT:  %[[Y:[a-z0-9_]+]]: f32[5, 16] = moe.experts(%{{.*}}, %[[W]], %[[I]], [
# CHECK-NOT:   {{[fi](32|64)}}[5, {{.*}}
# CHECK:       %[[PRODUCT:[a-z0-9_]+]]: f32[8] = mul(%[[CHOSEN]], %[[MEAN]])
# CHECK-NEXT:  %[[TOTAL:[a-z0-9_]+]]: f32[] = .sum(%[[PRODUCT]])
# CHECK-NEXT:  %[[LOSS:[a-z0-9_]+]]: f32[] = mul(8, %[[TOTAL]])
# CHECK-NEXT:  return %[[Y]], %[[LOSS]], %[[Z]]
