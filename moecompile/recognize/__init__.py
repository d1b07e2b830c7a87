"""The abstract interpreter that finds MoE layers in Dynamo graphs.

dims      what a tensor's dimensions are indexed by, and how views regroup them
roles     what each value of the graph is
mode      sees every ATen op and gives its results their roles
rules/    one op family a file: how an ATen op maps roles to roles
walk      runs the graph's nodes on fake tensors under that mode
layer     from the role of a layer's output to its spec and its live-ins
mlp       the experts' half of that: from an expression to the experts' spec
routing   the router's half
"""
