# RUN: moe-opt %s -p fuse-experts,fuse-router,join-router | FileCheck %s
import torch
from torch import nn
from torch.nn import functional as F


class ReadElsewhere(nn.Module):
    """One layer whose ids leave, one whose weights do, and one whose logits are written before its experts run."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.randn(4, 16))
        self.up = nn.Parameter(torch.randn(4, 24, 16))
        self.down = nn.Parameter(torch.randn(4, 16, 24))

    def layer(self, x, written=False):
        logits = F.linear(x, self.gate)
        weights, ids = torch.topk(logits.softmax(-1), 2)
        if written:
            logits.mul_(0)
        h = F.relu(torch.einsum("th,tkfh->tkf", x, self.up[ids]))
        return (torch.einsum("tkf,tkhf->tkh", h, self.down[ids]) * weights.unsqueeze(-1)).sum(1), weights, ids

    def forward(self, x):
        x, _, ids = self.layer(x)
        x, weights, _ = self.layer(x)
        x, _, _ = self.layer(x, written=True)
        return x, weights, ids


def example():
    return ReadElsewhere(), (torch.randn(5, 16),)


# CHECK-LABEL: // after join-router
# CHECK-NOT:     moe.routed_experts
# CHECK-COUNT-3: moe.experts(
# CHECK-NOT:     moe.routed_experts
