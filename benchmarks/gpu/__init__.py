"""MoE layers on one GPU: correctness, then times beside other implementations and the floor.  python -m benchmarks.gpu"""
