# RUN: moe-opt %s -p fuse-experts | FileCheck %s
import torch
from torch import nn
from torch.nn import functional as F


class Loop(nn.Module):
    """A loop over four separate experts that adds what each gives: E=4 K=2 H=16 F=24."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(16, 4)
        self.up = nn.ModuleList(nn.Linear(16, 24) for _ in range(4))
        self.down = nn.ModuleList(nn.Linear(24, 16) for _ in range(4))

    def forward(self, x):
        weights, ids = torch.topk(self.gate(x).softmax(-1), 2)
        out = torch.zeros_like(x)
        for e in range(4):
            token, slot = torch.where(ids == e)
            y = self.down[e](F.relu(self.up[e](x[token])))
            out.index_add_(0, token, y * weights[token, slot].unsqueeze(-1))
        return out


def example():
    return Loop(), (torch.randn(8, 16),)


# Eight matrices and eight biases stay where they are: each expert's lies in a parameter of its own.
# CHECK-LABEL: // after fuse-experts
# CHECK-NEXT:  // fused
# CHECK-NOT:   torch.nn.functional.relu
# CHECK-NOT:   torch.where
# CHECK-NOT:   .index_add_
# CHECK:       %[[Y:[a-z0-9_]+]]: f32[8, 16] = moe.experts(%[[X:[a-z0-9_]+]], %[[W:[a-z0-9_]+]], %[[I:[a-z0-9_]+]], [{{.*}}])
# CHECK-NEXT:  // E=4 K=2 H=16 F=24 O=16, f32 -> f32, {{.*}}, weight on output, ids outside 0..E-1: skip
# CHECK-NEXT:  // h0 = p{{[0-9]+}}..p{{[0-9]+}}[n*16 + k], b0 = p{{[0-9]+}}..p{{[0-9]+}}[n], down = p{{.*}}[n*24 + k], {{.*}}[n]
# CHECK-NEXT:  return %[[Y]]
