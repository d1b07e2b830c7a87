# RUN: moe-opt %s -p fuse-experts | FileCheck %s
import torch
from torch import nn
from torch.nn import functional as F


class Sorted(nn.Module):
    """Rows sorted by expert, one grouped matmul for gate and up, one for down: E=4 K=2 H=32 F=64."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.randn(4, 32, dtype=torch.bfloat16))
        self.gate_up = nn.Parameter(torch.randn(4, 128, 32, dtype=torch.bfloat16))
        self.down = nn.Parameter(torch.randn(4, 32, 64, dtype=torch.bfloat16))

    def forward(self, x):
        weights, ids = torch.topk(F.linear(x, self.gate).softmax(-1, dtype=torch.float32), 2)
        order = ids.flatten().argsort()
        ends = torch.histc(ids.flatten().float(), 4, 0, 3).cumsum(0).to(torch.int32)
        h = F.grouped_mm(x[order // 2], self.gate_up.transpose(1, 2), offs=ends)
        gate, up = h.chunk(2, -1)
        y = F.grouped_mm(F.silu(gate) * up, self.down.transpose(1, 2), offs=ends)
        y = y * weights.flatten()[order].unsqueeze(-1).to(y.dtype)
        return y[order.argsort()].view(-1, 2, 32).sum(1)


def example():
    return Sorted(), (torch.randn(8, 32, dtype=torch.bfloat16),)


# CHECK-LABEL: // captured
# CHECK:       %[[X:[a-z0-9_]+]]: bf16[8, 32] = input
# CHECK:       grouped_mm

# CHECK-LABEL: // after fuse-experts
# CHECK-NEXT:  // fused
# CHECK:       %[[UP:[a-z0-9_]+]]: bf16[4, 128, 32] = input
# CHECK:       %[[DOWN:[a-z0-9_]+]]: bf16[4, 32, 64] = input
# CHECK:       = torch.topk(
# CHECK-NOT:   grouped_mm
# CHECK-NOT:   argsort
# CHECK:       %[[Y:[a-z0-9_]+]]: bf16[8, 32] = moe.experts(
# CHECK-NEXT:  // E=4 K=2 H=32 F=64 O=32, bf16 -> bf16
# CHECK-NEXT:  // h0 = p0[e*4096 + n*32 + k], h1 = p0[2048 + e*4096 + n*32 + k], down = p1[e*2048 + n*64 + k]
# CHECK-NEXT:  return %[[Y]]
