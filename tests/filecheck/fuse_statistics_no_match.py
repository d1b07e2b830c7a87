# RUN: moe-opt %s -p fuse-experts,fuse-router,fuse-statistics | FileCheck %s
import torch
from torch import nn
from torch.nn import functional as F


class Masked(nn.Module):
    """Padding is masked before the mean, and the op sums over all tokens: the loss is left as it was.  E=8 K=2 H=16 F=24."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.randn(8, 16))
        self.up = nn.Parameter(torch.randn(8, 24, 16))
        self.down = nn.Parameter(torch.randn(8, 16, 24))

    def forward(self, x, mask):
        logits = F.linear(x, self.gate)
        weights, ids = torch.topk(logits.softmax(-1), 2)
        h = F.relu(torch.einsum("th,tkfh->tkf", x, self.up[ids]))
        y = (torch.einsum("tkf,tkhf->tkh", h, self.down[ids]) * weights.unsqueeze(-1)).sum(1)
        mean = (F.softmax(logits, dim=-1) * mask[:, None]).mean(0)
        return y, 8 * (F.one_hot(ids, 8).sum(1).float().mean(0) * mean).sum()


def example():
    return Masked(), (torch.randn(5, 16), torch.ones(5))


# CHECK-LABEL: // after fuse-statistics
# CHECK:       %[[LOGITS:[a-z0-9_]+]]: f32[5, 8] = torch.nn.functional.linear(
# CHECK-NOT:   moe.route_stats
# CHECK:       %[[R:[a-z0-9_]+]]: (f32[5, 2], i64[5, 2]) = moe.route(%[[LOGITS]])
# CHECK-NOT:   moe.route_stats
# CHECK:       %[[P:[a-z0-9_]+]]: f32[5, 8] = torch.nn.functional.softmax(%[[LOGITS]]
# CHECK:       %[[M:[a-z0-9_]+]]: f32[5, 8] = mul(%[[P]],
# CHECK-NEXT:  f32[8] = .mean(%[[M]], 0)
# CHECK:       torch.nn.functional.one_hot(
# CHECK-NOT:   moe.route_stats
# CHECK:       return
