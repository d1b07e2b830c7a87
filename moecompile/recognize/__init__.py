"""The abstract interpreter that finds MoE layers in Dynamo graphs."""
