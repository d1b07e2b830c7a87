"""The IR: what a layer is (spec), the moe.* ops and what they compute (ops, reference), pointwise expressions (expr)."""
