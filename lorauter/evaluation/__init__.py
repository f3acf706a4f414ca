"""Evaluation: regimes, metrics, the answering step, reports and plots.

Importing the package loads nothing. `answering` needs torch, transformers and safetensors alone, so that it runs on
a bare GPU machine from a file of decisions; `metrics`, `report` and `plots` need no language model.
"""
