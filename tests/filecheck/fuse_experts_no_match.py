# RUN: moe-opt %s -p fuse-experts | FileCheck %s
import torch
from torch import nn
from torch.nn import functional as F


class OneForgotten(nn.Module):
    """Looks like a layer of four experts, but the loop ends one expert early: E=4 K=2 H=16 F=24."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(16, 4)
        self.up = nn.Parameter(torch.randn(4, 24, 16))
        self.down = nn.Parameter(torch.randn(4, 16, 24))

    def forward(self, x):
        weights, ids = torch.topk(self.gate(x).softmax(-1), 2)
        out = torch.zeros_like(x)
        for e in range(3):
            token, slot = torch.where(ids == e)
            y = F.linear(F.relu(F.linear(x[token], self.up[e])), self.down[e])
            out.index_add_(0, token, y * weights[token, slot].unsqueeze(-1))
        return out


def example():
    return OneForgotten(), (torch.randn(8, 16),)


# CHECK-LABEL: // after fuse-experts
# CHECK-NEXT:  // declined {{.*}}expert
# CHECK-NOT:   moe.experts
# CHECK:       .index_add_
# CHECK:       .index_add_
# CHECK:       .index_add_
# CHECK-NOT:   moe.experts
# CHECK:       return
