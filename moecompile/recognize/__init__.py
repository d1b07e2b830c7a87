"""The abstract interpreter that finds MoE layers in Dynamo graphs.

dims      what a tensor's dimensions are indexed by, and how views regroup them
roles     what each value of the graph is
walk      runs the graph on fake tensors and gives every value its role
rules/    one op family a file: how an ATen op maps roles to roles
layer     from the role of a layer's output to its spec and its live-ins
"""
